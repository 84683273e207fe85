//! Services written as futures: one task a connection, on a worker that never parks.
//!
//! [`Tasks`] is a [`Service`]: it runs a future for each connection that is accepted. [`TcpStream`] and
//! [`UdpSocket`] are what the futures use; streams have the traits of `futures-io`, so protocol crates that are
//! written for those work here.
//!
//! Contract: futures are polled within turns and must behave as a service does. Places for them are made with
//! the host: a connection takes one, and is refused when there is none. A task is polled when something came of
//! a connection of its own, when its [`sleep`] is over, or when its waker was used; at most [`Tasks::A_TURN`] of
//! them a turn. Streams and sockets work within tasks of the host that made them, and nowhere else.

use super::flows::Flow;
use super::service::{Connection, ConnectionId, Ending, Ends, Service};
use super::sockets::{ConnectError, Sockets};
use super::timers::Timers;
use futures_io::{AsyncRead, AsyncWrite};
use scoped_tls_hkt::scoped_thread_local;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

scoped_thread_local!(static mut HERE: for<'a> (&'a mut Sockets, &'a mut Inside));

/// The sockets and the task that is being polled.
fn here<R>(f: impl FnOnce(&mut Sockets, &mut Inside) -> R) -> R {
    assert!(HERE.is_set(), "sockets of a host are used within its tasks, and nowhere else");
    HERE.with(|(sockets, inside)| f(sockets, inside))
}

const NOBODY: u32 = u32::MAX;

/// Which tasks are to be polled: a bit for each, and one for each 64 of those.
#[derive(Debug)]
struct Woken {
    tasks: Vec<AtomicU64>,
    groups: Vec<AtomicU64>,
}

impl Woken {
    fn new(tasks: usize) -> Self {
        let zeroes = |bits: usize| (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let words = zeroes(tasks);
        let groups = zeroes(words.len());
        Self { tasks: words, groups }
    }

    fn wake(&self, task: u32) {
        let word = task as usize / 64;
        if let (Some(tasks), Some(group)) = (self.tasks.get(word), self.groups.get(word / 64)) {
            tasks.fetch_or(1 << (task % 64), Ordering::AcqRel);
            group.fetch_or(1 << (word % 64), Ordering::AcqRel);
        }
    }

    /// Takes one, from `from` on and around.
    fn take(&self, from: u32) -> Option<u32> {
        let groups = self.groups.len();
        let start = from as usize / 4096;
        // The first group twice: from `from` on, and what is before it.
        for step in 0..=groups {
            let at = (start + step) % groups.max(1);
            let group = self.groups.get(at)?;
            let mut words = group.load(Ordering::Acquire);
            while words != 0 {
                let word = at * 64 + words.trailing_zeros() as usize;
                words &= words - 1;
                let later =
                    if step == 0 && word == from as usize / 64 { u64::MAX << (from % 64) } else { u64::MAX };
                if step == 0 && word < from as usize / 64 {
                    continue;
                }
                let Some(tasks) = self.tasks.get(word) else { continue };
                let bits = tasks.load(Ordering::Acquire) & later;
                if bits == 0 {
                    if tasks.load(Ordering::Acquire) == 0 {
                        group.fetch_and(!(1 << (word % 64)), Ordering::AcqRel);
                        // Somebody may have come in between.
                        if tasks.load(Ordering::Acquire) != 0 {
                            group.fetch_or(1 << (word % 64), Ordering::AcqRel);
                        }
                    }
                    continue;
                }
                let bit = bits.trailing_zeros();
                tasks.fetch_and(!(1 << bit), Ordering::AcqRel);
                return Some(word as u32 * 64 + bit);
            }
        }
        None
    }
}

/// Wakes a task.
#[derive(Debug)]
struct Bell {
    woken: Arc<Woken>,
    task: u32,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.wake(self.task);
    }
}

/// What streams and timers find out about, and tell, the tasks.
#[derive(Debug)]
struct Inside {
    woken: Arc<Woken>,
    /// The task that has a connection, by its place.
    owners: Vec<u32>,
    /// Connections that are being made, by place: not yet, made, or failed.
    begun: Vec<Begun>,
    timers: Timers,
    /// When the sleep of a task is over, in nanoseconds.
    deadlines: Vec<u64>,
    current: u32,
    /// The tasks that wait for datagrams, by place of the UDP port.
    readers: Vec<(u16, u32)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    Pending,
    Made,
    Failed,
}

/// A task's place. Boxed once; a future is put into it, and dropped where it is.
struct Task<F> {
    future: Pin<Box<Option<F>>>,
    waker: Waker,
}

/// A future that runs from the start.
pub type Background = Pin<Box<dyn Future<Output = ()>>>;

/// A service whose connections are served by futures that `serve` makes.
pub struct Tasks<M, F> {
    serve: M,
    tasks: Vec<Task<F>>,
    /// Futures that run from the start.
    background: Vec<(Background, Waker)>,
    free: Vec<u32>,
    inside: Inside,
    next: u32,
}

impl<M, F> std::fmt::Debug for Tasks<M, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tasks")
            .field("tasks", &self.tasks.len())
            .field("free", &self.free.len())
            .finish_non_exhaustive()
    }
}

impl<M, F> Tasks<M, F>
where
    M: FnMut(TcpStream) -> F,
    F: Future<Output = ()>,
{
    /// Tasks polled in a turn at most.
    pub const A_TURN: usize = 256;

    /// Tasks for a host with so many `connections` at the same time.
    #[must_use]
    pub fn new(connections: u32, serve: M) -> Self {
        Self::with_background(connections, serve, Vec::new())
    }

    /// As [`Tasks::new`], with futures that run from the start: for UDP, for connections that nobody asked for.
    #[must_use]
    pub fn with_background(connections: u32, serve: M, background: Vec<Background>) -> Self {
        let all = connections as usize + background.len();
        let woken = Arc::new(Woken::new(all));
        let waker = |task: u32| Waker::from(Arc::new(Bell { woken: Arc::clone(&woken), task }));
        let tasks =
            (0..connections).map(|task| Task { future: Box::pin(None), waker: waker(task) }).collect();
        let background: Vec<_> = (connections..).zip(background).map(|(task, f)| (f, waker(task))).collect();
        for task in connections..all as u32 {
            woken.wake(task);
        }
        Self {
            serve,
            tasks,
            background,
            free: (0..connections).rev().collect(),
            inside: Inside {
                woken,
                owners: vec![NOBODY; connections as usize],
                begun: vec![Begun::Pending; connections as usize],
                timers: Timers::new(all, 0),
                deadlines: vec![0; all],
                current: NOBODY,
                readers: Vec::with_capacity(64),
            },
            next: 0,
        }
    }

    fn poll(&mut self, sockets: &mut Sockets, task: u32) {
        let Self { tasks, background, free, inside, .. } = self;
        inside.current = task;
        if let Some(task_there) = tasks.get_mut(task as usize) {
            let mut context = Context::from_waker(&task_there.waker);
            let Some(future) = task_there.future.as_mut().as_pin_mut() else { return };
            let over = HERE.set((sockets, inside), || future.poll(&mut context).is_ready());
            if over {
                // Its streams close as they are dropped, so within.
                HERE.set((sockets, inside), || task_there.future.set(None));
                inside.timers.cancel(task);
                free.push(task);
            }
        } else if let Some((future, waker)) = background.get_mut(task as usize - tasks.len()) {
            let mut context = Context::from_waker(waker);
            if HERE.set((sockets, inside), || future.as_mut().poll(&mut context).is_ready()) {
                // Nothing will wake it again that it could be polled for.
                *future = Box::pin(std::future::pending());
            }
        }
        inside.current = NOBODY;
    }
}

impl<M, F> Service for Tasks<M, F>
where
    M: FnMut(TcpStream) -> F,
    F: Future<Output = ()>,
{
    type State = ();

    fn accept(&mut self, connection: &mut Connection<'_>) -> Option<()> {
        let id = connection.id();
        let place = id.place as usize;
        if let (Some(owner), Some(begun)) = (self.inside.owners.get(place), self.inside.begun.get_mut(place))
            && *owner != NOBODY
        {
            // Ours: the task waits for it.
            *begun = Begun::Made;
            self.inside.woken.wake(*owner);
            return Some(());
        }
        let task = self.free.pop()?;
        let future = (self.serve)(TcpStream { id, closed: false });
        *self.inside.owners.get_mut(place)? = task;
        self.tasks.get_mut(task as usize)?.future.set(Some(future));
        self.inside.woken.wake(task);
        Some(())
    }

    fn readable(&mut self, connection: &mut Connection<'_>, _: &mut ()) {
        self.wake_owner(connection.id());
    }

    fn writable(&mut self, connection: &mut Connection<'_>, _: &mut ()) {
        self.wake_owner(connection.id());
    }

    fn finished(&mut self, connection: &mut Connection<'_>, _: &mut ()) {
        self.wake_owner(connection.id());
    }

    fn closed(&mut self, _: &mut Sockets, id: ConnectionId, _: (), _: Ending) {
        self.wake_owner(id);
        if let Some(owner) = self.inside.owners.get_mut(id.place as usize) {
            *owner = NOBODY;
        }
    }

    fn failed(&mut self, _: &mut Sockets, id: ConnectionId) {
        self.wake_owner(id);
        if let (Some(owner), Some(begun)) =
            (self.inside.owners.get_mut(id.place as usize), self.inside.begun.get_mut(id.place as usize))
        {
            *owner = NOBODY;
            *begun = Begun::Failed;
        }
    }

    fn datagrams(&mut self, _: &mut Sockets, port: u16) {
        for (_, task) in self.inside.readers.iter().filter(|(reader, _)| *reader == port) {
            self.inside.woken.wake(*task);
        }
    }

    fn turn(&mut self, sockets: &mut Sockets) {
        let now = sockets.now();
        while let Some(task) = self.inside.timers.due(now / 1_000_000) {
            // Early where it is beyond the wheel's horizon: the task sets it again.
            self.inside.woken.wake(task);
        }
        for _ in 0..Self::A_TURN {
            let Some(task) = self.inside.woken.take(self.next) else { break };
            self.next = task + 1;
            self.poll(sockets, task);
        }
    }
}

impl<M, F> Tasks<M, F> {
    fn wake_owner(&self, id: ConnectionId) {
        if let Some(owner) = self.inside.owners.get(id.place as usize).filter(|owner| **owner != NOBODY) {
            self.inside.woken.wake(*owner);
        }
    }
}

/// A TCP connection in a task. Dropped, it sends what was written and closes.
#[derive(Debug)]
pub struct TcpStream {
    id: ConnectionId,
    closed: bool,
}

impl TcpStream {
    /// Makes a connection.
    ///
    /// # Errors
    /// [`ConnectError`] within `io::ErrorKind::Other` when it cannot be begun; `ConnectionRefused` when the peer
    /// resets it or does not answer.
    pub async fn connect(remote: SocketAddr) -> io::Result<Self> {
        let id = here(|sockets, inside| {
            let id = sockets.connect(remote).map_err(|error: ConnectError| io::Error::other(error))?;
            let place = id.place as usize;
            if let (Some(owner), Some(begun)) = (inside.owners.get_mut(place), inside.begun.get_mut(place)) {
                *owner = inside.current;
                *begun = Begun::Pending;
            }
            Ok::<_, io::Error>(id)
        })?;
        // From here on it is closed when nobody waits for it any more.
        let stream = Self { id, closed: false };
        poll_fn(|_| {
            here(|_, inside| match inside.begun.get(id.place as usize) {
                Some(Begun::Pending) => Poll::Pending,
                Some(Begun::Made) => Poll::Ready(Ok(())),
                Some(Begun::Failed) | None => {
                    Poll::Ready(Err(io::Error::from(io::ErrorKind::ConnectionRefused)))
                }
            })
        })
        .await?;
        Ok(stream)
    }

    /// Which connection it is.
    #[must_use]
    pub const fn id(&self) -> ConnectionId {
        self.id
    }

    /// Both ends; `None` when it has ended.
    #[must_use]
    pub fn flow(&self) -> Option<Flow> {
        here(|sockets, _| sockets.get(self.id).map(|mut connection| connection.flow()))
    }

    /// Ends it at once, with a reset.
    pub fn abort(mut self) {
        self.closed = true;
        here(|sockets, _| {
            if let Some(mut connection) = sockets.get(self.id) {
                connection.abort();
            }
        });
    }

    fn with<R>(&self, f: impl FnOnce(&mut Connection<'_>) -> Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        here(|sockets, _| match sockets.get(self.id) {
            Some(mut connection) => f(&mut connection),
            None => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
        })
    }
}

impl Drop for TcpStream {
    fn drop(&mut self) {
        // Outside of a turn the host itself is being dropped.
        if !self.closed && HERE.is_set() {
            here(|sockets, _| {
                if let Some(mut connection) = sockets.get(self.id) {
                    connection.close();
                }
            });
        }
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        self.with(|connection| match connection.receive(into) {
            0 if into.is_empty() || connection.is_finished() => Poll::Ready(Ok(0)),
            0 => Poll::Pending,
            read => Poll::Ready(Ok(read)),
        })
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|connection| match connection.send(bytes) {
            0 if bytes.is_empty() => Poll::Ready(Ok(0)),
            0 if !connection.may_send() => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            0 => Poll::Pending,
            sent => Poll::Ready(Ok(sent)),
        })
    }

    /// What was written is sent at the end of the turn anyway.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.closed = true;
        let _ = self.with(|connection| {
            connection.close();
            Poll::Ready(Ok(()))
        });
        Poll::Ready(Ok(()))
    }
}

/// A UDP port of the host's configuration, in a task. One task reads from a port at a time.
#[derive(Debug)]
pub struct UdpSocket {
    port: u16,
}

impl UdpSocket {
    /// A port that the configuration opens.
    ///
    /// # Errors
    /// `NotFound` when it opens no such port, `AddrInUse` when another task has it.
    pub fn open(port: u16) -> io::Result<Self> {
        here(|sockets, inside| {
            if sockets.udp(port).is_none() {
                return Err(io::ErrorKind::NotFound.into());
            }
            if inside.readers.iter().any(|(reader, _)| *reader == port) {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            inside.readers.push((port, inside.current));
            Ok(Self { port })
        })
    }

    /// Waits for a datagram and copies it, as far as there is room; says how long it is, and its ends.
    ///
    /// # Errors
    /// None, for now.
    pub async fn receive(&self, into: &mut [u8]) -> io::Result<(usize, Ends)> {
        poll_fn(|_| {
            here(|sockets, _| {
                let mut datagrams = sockets.udp(self.port)?;
                datagrams.receive(|bytes, ends| {
                    let len = bytes.len().min(into.len());
                    into[..len].copy_from_slice(&bytes[..len]);
                    (len, ends)
                })
            })
            .map_or(Poll::Pending, |found| Poll::Ready(Ok(found)))
        })
        .await
    }

    /// Copies a datagram to be sent. False when there is no room for it, and it is lost.
    #[must_use]
    pub fn send(&self, bytes: &[u8], ends: Ends) -> bool {
        here(|sockets, _| sockets.udp(self.port).is_some_and(|mut port| port.send(bytes, ends)))
    }
}

impl Drop for UdpSocket {
    fn drop(&mut self) {
        if HERE.is_set() {
            here(|_, inside| inside.readers.retain(|(port, _)| *port != self.port));
        }
    }
}

/// Lets other tasks run for so long, to the millisecond. A task has one such timer: of two sleeps that it waits
/// for at the same time, the earlier wakes it, and the other sets it again.
pub async fn sleep(duration: Duration) {
    let mut until = None;
    poll_fn(|_| {
        here(|sockets, inside| {
            let now = sockets.now();
            let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
            let until = *until.get_or_insert(now.saturating_add(nanos));
            if now >= until {
                return Poll::Ready(());
            }
            let task = inside.current;
            if let Some(deadline) = inside.deadlines.get_mut(task as usize) {
                if *deadline <= now || until < *deadline {
                    *deadline = until;
                }
                inside.timers.set(task, deadline.div_ceil(1_000_000));
            }
            Poll::Pending
        })
    })
    .await;
}
