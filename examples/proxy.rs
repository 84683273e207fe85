//! A TCP load balancer on one strict worker: each connection goes to one of several back-ends that answer.
//!
//! `proxy INTERFACE ADDRESS/LENGTH PORT BACKEND...` (as root): listens on PORT of the address, which is the proxy's
//! own; a back-end is an address and port such as `192.0.2.20:8080`. Back-ends are asked every second whether they
//! take a connection; those that do not get none until they do. Connections go round; one that its back-end refuses
//! goes to the next.

use futures_io::{AsyncRead, AsyncWrite};
use isoplane::blocks::host::tasks::{Background, Tasks, TcpStream, sleep};
use std::cell::Cell;
use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// Back-ends at most.
const MOST: usize = 32;
/// Bytes that each direction of a connection may hold here.
const HELD: usize = 4096;

/// Who can be given connections.
struct Backends {
    all: Vec<SocketAddr>,
    well: [Cell<bool>; MOST],
    next: Cell<usize>,
}

impl Backends {
    /// Those that answer, the next one first.
    fn turn(&self) -> impl Iterator<Item = usize> + '_ {
        let first = self.next.get();
        self.next.set((first + 1) % self.all.len());
        (0..self.all.len()).map(move |n| (first + n) % self.all.len()).filter(|n| self.well[*n].get())
    }
}

/// One direction of a connection.
struct Pipe {
    held: [u8; HELD],
    from: usize,
    to: usize,
    read_all: bool,
    done: bool,
}

impl Pipe {
    const fn new() -> Self {
        Self { held: [0; HELD], from: 0, to: 0, read_all: false, done: false }
    }

    /// Moves bytes until there are none, there is no room, or all of them are over.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        source: &mut TcpStream,
        sink: &mut TcpStream,
    ) -> Poll<io::Result<()>> {
        loop {
            if self.done {
                return Poll::Ready(Ok(()));
            }
            if self.from < self.to {
                let sent = ready!(Pin::new(&mut *sink).poll_write(context, &self.held[self.from..self.to]))?;
                self.from += sent;
            } else if self.read_all {
                ready!(Pin::new(&mut *sink).poll_close(context))?;
                self.done = true;
            } else {
                (self.from, self.to) =
                    (0, ready!(Pin::new(&mut *source).poll_read(context, &mut self.held))?);
                self.read_all = self.to == 0;
            }
        }
    }
}

async fn serve(mut client: TcpStream, backends: Rc<Backends>) {
    for backend in backends.turn() {
        let Ok(mut server) = TcpStream::connect(backends.all[backend]).await else {
            backends.well[backend].set(false);
            continue;
        };
        let (mut up, mut down) = (Pipe::new(), Pipe::new());
        let over = poll_fn(|context| {
            let there = up.poll(context, &mut client, &mut server)?;
            let back = down.poll(context, &mut server, &mut client)?;
            if there.is_ready() && back.is_ready() {
                Poll::Ready(Ok::<_, io::Error>(()))
            } else {
                Poll::Pending
            }
        });
        if over.await.is_err() {
            // Half of it is gone: the other half is told.
            client.abort();
            server.abort();
        }
        return;
    }
    client.abort();
}

/// Asks one back-end, again and again.
async fn check(backend: usize, backends: Rc<Backends>) {
    loop {
        let answer = TcpStream::connect(backends.all[backend]).await;
        backends.well[backend].set(answer.is_ok());
        drop(answer);
        sleep(Duration::from_secs(1)).await;
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if !(4..3 + MOST).contains(&args.len()) {
        return Err("usage: proxy INTERFACE ADDRESS/LENGTH PORT BACKEND...".into());
    }
    let port = args[2].parse()?;
    let all = args[3..].iter().map(|backend| backend.parse()).collect::<Result<Vec<SocketAddr>, _>>()?;
    isoplane_examples::serve(
        "proxy",
        &args,
        |host| host.listen(port),
        move |host| {
            let backends = Rc::new(Backends {
                all: all.clone(),
                well: [const { Cell::new(false) }; MOST],
                next: Cell::new(0),
            });
            let checks = (0..all.len()).map(|n| Box::pin(check(n, Rc::clone(&backends))) as Background);
            let checks = checks.collect();
            Tasks::with_background(
                host.connections,
                move |client| serve(client, Rc::clone(&backends)),
                checks,
            )
        },
    )
}
