//! An HTTP/1.1 server on one strict worker: a page at `/`, counters at `/metrics`; keep-alive and pipelining.
//!
//! `http INTERFACE ADDRESS/LENGTH [PORT]` (as root). The address is the server's own: the interface's kernel side
//! must not have it.

use isoplane::blocks::host::{Connection, ConnectionId, Ending, Service, Sockets};
use std::error::Error;
use std::io::Write;

const PAGE: &[u8] =
    b"<!doctype html><title>isoplane</title><p>Served by a worker that never enters the kernel.\n";
/// A request's head has to fit, and so does the longest answer.
const HEAD: usize = 4096;
const ANSWER: usize = 1024;

/// What a request is answered with.
enum Answer {
    /// Answered; `close` says whether the connection ends with it. So many bytes of input were the request's.
    Done { used: usize, close: bool },
    /// The rest of it has not come yet.
    Partial,
    /// The answer has to wait until there is room for it.
    NoRoom,
}

#[derive(Default)]
struct Http {
    requests: u64,
    bad: u64,
    connections: u64,
}

impl Http {
    /// Writes one whole answer, or nothing.
    fn respond(
        &self,
        connection: &mut Connection<'_>,
        status: &str,
        kind: &str,
        body: &[u8],
        head: bool,
        close: bool,
    ) -> bool {
        let mut text = [0; ANSWER];
        let mut rest = &mut text[..];
        let close = if close { "Connection: close\r\n" } else { "" };
        let written = write!(
            rest,
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{close}\r\n",
            body.len()
        )
        .and_then(|()| if head { Ok(()) } else { rest.write_all(body) });
        let left = rest.len();
        let answer = &text[..ANSWER - left];
        // In one piece, so that a request is never half answered.
        written.is_ok() && connection.room() >= answer.len() && connection.send(answer) == answer.len()
    }

    /// Answers the first request in `input`.
    fn answer(&mut self, connection: &mut Connection<'_>, input: &[u8]) -> Answer {
        if connection.room() < ANSWER {
            return Answer::NoRoom;
        }
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut headers);
        let used = match request.parse(input) {
            Ok(httparse::Status::Complete(used)) => used,
            Ok(httparse::Status::Partial) if input.len() < HEAD => return Answer::Partial,
            Ok(httparse::Status::Partial) => {
                return self.refuse(connection, input.len(), "431 Request Header Fields Too Large");
            }
            Err(_) => return self.refuse(connection, input.len(), "400 Bad Request"),
        };
        let header = |name: &str| {
            let found = request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
            found.map(|header| header.value)
        };
        // A body would have to be read past; nothing here takes one.
        if header("transfer-encoding").is_some()
            || header("content-length").is_some_and(|length| length != b"0")
        {
            return self.refuse(connection, input.len(), "413 Content Too Large");
        }
        let asks = |word: &[u8]| header("connection").is_some_and(|value| value.eq_ignore_ascii_case(word));
        let close = if request.version == Some(1) { asks(b"close") } else { !asks(b"keep-alive") };
        self.requests += 1;
        let mut metrics = [0; 512];
        let (status, kind, body): (_, _, &[u8]) = match (request.method, request.path) {
            (Some("GET" | "HEAD"), Some("/")) => ("200 OK", "text/html", PAGE),
            (Some("GET" | "HEAD"), Some("/metrics")) => {
                let mut rest = &mut metrics[..];
                let _ = writeln!(
                    rest,
                    "# TYPE http_requests_total counter\nhttp_requests_total {}",
                    self.requests
                );
                let _ = writeln!(
                    rest,
                    "# TYPE http_bad_requests_total counter\nhttp_bad_requests_total {}",
                    self.bad
                );
                let _ =
                    writeln!(rest, "# TYPE http_connections gauge\nhttp_connections {}", self.connections);
                let left = rest.len();
                ("200 OK", "text/plain; version=0.0.4", &metrics[..512 - left])
            }
            (Some("GET" | "HEAD"), _) => ("404 Not Found", "text/plain", b"there is / and /metrics\n"),
            _ => ("405 Method Not Allowed", "text/plain", b"GET and HEAD\n"),
        };
        let head = request.method == Some("HEAD");
        // There is room: it was looked at first.
        self.respond(connection, status, kind, body, head, close);
        Answer::Done { used, close }
    }

    fn refuse(&mut self, connection: &mut Connection<'_>, used: usize, status: &str) -> Answer {
        self.bad += 1;
        self.respond(connection, status, "text/plain", b"", false, true);
        Answer::Done { used, close: true }
    }
}

impl Service for Http {
    /// Whether the last answer was sent.
    type State = bool;

    fn accept(&mut self, _: &mut Connection<'_>) -> Option<bool> {
        self.connections += 1;
        Some(false)
    }

    fn readable(&mut self, connection: &mut Connection<'_>, over: &mut bool) {
        // The buffer may wrap within a request, so what there is is laid out first.
        let mut input = [0; HEAD];
        while !*over {
            let len = connection.peek(&mut input);
            if len == 0 {
                return;
            }
            match self.answer(connection, &input[..len]) {
                Answer::Done { used, close } => {
                    connection.skip(used);
                    if close {
                        *over = true;
                        connection.close();
                    }
                }
                Answer::Partial => return,
                Answer::NoRoom => return connection.wants_room(),
            }
        }
        // What comes after the last answer is nobody's.
        connection.skip(usize::MAX);
    }

    fn writable(&mut self, connection: &mut Connection<'_>, over: &mut bool) {
        self.readable(connection, over);
    }

    fn closed(&mut self, _: &mut Sockets, _: ConnectionId, _: bool, _: Ending) {
        self.connections -= 1;
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let port = match args.get(2) {
        _ if !(2..=3).contains(&args.len()) => {
            return Err("usage: http INTERFACE ADDRESS/LENGTH [PORT]".into());
        }
        Some(port) => port.parse()?,
        None => 80,
    };
    isoplane_examples::serve("http", &args, |host| host.listen(port), |_| Http::default())
}
