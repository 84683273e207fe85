//! One TCP connection, both ways at full speed, every byte checked.

use super::content::{self, Stream};
use super::exchange::in_time;
use super::{Endpoint, LOOK, Meter};
use crate::{LabError, sys};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest write.
const PIECE: usize = 16 << 10;
/// Longest read; a [`Stream`] can show as much at once.
const READ: usize = 48 << 10;
/// How long one attempt to connect may take; attempts go on until told to stop.
const CONNECT: Duration = Duration::from_millis(500);

/// Bytes that each end wrote and read, to be compared when both have ended.
#[derive(Debug, Default)]
struct Totals {
    written: [AtomicU64; 2],
    read: [AtomicU64; 2],
    ended: AtomicUsize,
}

pub(super) fn start(
    client: Endpoint<'_>,
    server: Endpoint<'_>,
    buffer: usize,
    meter: &Arc<Meter>,
    threads: &mut Vec<JoinHandle<()>>,
) -> Result<(), LabError> {
    let failed = |e| LabError::socket("opening a TCP socket", e);
    let inside = server.namespace.enter()?;
    let listener = listen(SocketAddr::new(server.address, 0), buffer);
    inside.leave()?;
    let (listener, address) = listener.map_err(failed)?;
    let totals = Arc::new(Totals::default());
    {
        let (meter, totals) = (Arc::clone(meter), Arc::clone(&totals));
        threads.push(server.namespace.spawn("lab-tcp-server", move || {
            let stream = accept(&listener, &meter);
            finish(1, stream, &totals, &meter);
        })?);
    }
    let (meter, from) = (Arc::clone(meter), SocketAddr::new(client.address, 0));
    threads.push(client.namespace.spawn("lab-tcp-client", move || {
        let stream = connect(from, address, buffer, &meter);
        finish(0, stream, &totals, &meter);
    })?);
    Ok(())
}

fn socket(address: SocketAddr, buffer: usize) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_send_buffer_size(buffer)?;
    socket.set_recv_buffer_size(buffer)?;
    Ok(socket)
}

fn listen(address: SocketAddr, buffer: usize) -> io::Result<(TcpListener, SocketAddr)> {
    let socket = socket(address, buffer)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(1)?;
    socket.set_nonblocking(true)?;
    let listener = TcpListener::from(socket);
    let address = listener.local_addr()?;
    Ok((listener, address))
}

fn accept(listener: &TcpListener, meter: &Meter) -> Option<TcpStream> {
    while !meter.stopping() {
        match listener.accept() {
            Ok((stream, _)) => return Some(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait(listener, PollFlags::POLLIN);
            }
            Err(error) => {
                meter.error("accept", &error);
                std::thread::sleep(LOOK);
            }
        }
    }
    None
}

fn connect(from: SocketAddr, to: SocketAddr, buffer: usize, meter: &Meter) -> Option<TcpStream> {
    while !meter.stopping() {
        let attempt = socket(from, buffer).and_then(|socket| {
            socket.bind(&SockAddr::from(from))?;
            socket.connect_timeout(&SockAddr::from(to), CONNECT)?;
            Ok(TcpStream::from(socket))
        });
        match attempt {
            Ok(stream) => return Some(stream),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
            Err(error) => {
                meter.error("connect", &error);
                std::thread::sleep(LOOK);
            }
        }
    }
    None
}

fn wait(socket: &impl AsFd, flags: PollFlags) {
    // What came of it is found out by the call that follows.
    let _ = poll(&mut [PollFd::new(socket.as_fd(), flags)], PollTimeout::from(LOOK.as_millis() as u8));
}

/// Runs one end, and after the second one compares what went in with what came out.
fn finish(end: usize, stream: Option<TcpStream>, totals: &Totals, meter: &Meter) {
    if let Some(stream) = stream {
        match carry(end, &stream, totals, meter) {
            Ok(()) => {}
            Err(error) => meter.error("transfer", &error),
        }
        Meter::count(&meter.retransmitted, sys::tcp_retransmitted(&stream).unwrap_or(0));
    }
    if totals.ended.fetch_add(1, Ordering::AcqRel) == 1 {
        for end in 0..2 {
            let written = totals.written[end].load(Ordering::Acquire);
            let read = totals.read[1 - end].load(Ordering::Acquire);
            Meter::count(&meter.lost, written.saturating_sub(read));
        }
    }
}

/// Writes one stream and checks the other, until told to stop and both directions have ended.
fn carry(end: usize, mut stream: &TcpStream, totals: &Totals, meter: &Meter) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let streams = [Stream::new(0x00c1_1e47), Stream::new(0x05e7_7e72)];
    let (ours, theirs) = (&streams[end], &streams[1 - end]);
    let (written, read) = (&totals.written[end], &totals.read[end]);
    let (mut pieces, mut writing, mut reading) = (0, true, true);
    let mut buffer = vec![0; READ];
    let mut last_word = None;
    while writing || reading {
        if meter.stopping() {
            if writing {
                stream.shutdown(Shutdown::Write)?;
                writing = false;
            }
            if Instant::now() > *last_word.get_or_insert_with(|| Instant::now() + meter.last_word()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        let mut waits = PollFlags::empty();
        if reading {
            match in_time(stream.read(&mut buffer))? {
                Some(0) => reading = false,
                Some(n) => {
                    let position = read.fetch_add(n as u64, Ordering::Release);
                    if *theirs.at(position, n) == buffer[..n] {
                        meter.verified(n);
                    } else {
                        Meter::count(&meter.corrupt, 1);
                    }
                }
                None => waits |= PollFlags::POLLIN,
            }
        }
        if writing {
            let piece = ours.at(written.load(Ordering::Relaxed), content::size(pieces, 1, PIECE));
            match in_time(stream.write(piece))? {
                Some(n) => {
                    written.fetch_add(n as u64, Ordering::Release);
                    meter.sent(n);
                    pieces += 1;
                }
                None => waits |= PollFlags::POLLOUT,
            }
        }
        // Wait only when neither direction moved.
        let wanted = [(reading, PollFlags::POLLIN), (writing, PollFlags::POLLOUT)];
        if wanted.iter().all(|(wants, flag)| !wants || waits.contains(*flag)) && !waits.is_empty() {
            wait(stream, waits);
        }
    }
    Ok(())
}
