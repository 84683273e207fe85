//! The cold half of a pcap port.

use super::error::PcapError;
use super::film::Film;
use super::halves::{PcapRx, PcapTx, Show};
use super::recording::Recording;
use super::writer::{PcapKick, Writer};
use crate::capture::{CaptureConfig, capture};
use crate::port::{Capabilities, KickTarget, LinkState, Port, PortStatistics};
use crate::queue::Queue;
use isoplane_memory::{BATCH, Clock, Pool};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// How often a recording is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rounds {
    /// Once; then nothing arrives any more.
    #[default]
    Once,
    /// Again and again.
    Forever,
}

/// How fast a recording is played.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pace {
    /// As fast as packets are taken.
    #[default]
    Fast,
    /// As it was recorded: from the first packet that is taken on, each arrives when it did then, or as soon after as
    /// somebody looks. One that is older than the packet before it comes with that one.
    Original,
}

/// How to open a [`PcapPort`].
#[derive(Debug, Clone)]
pub struct PcapConfig {
    /// Name of the port, for messages and counters.
    pub name: String,
    /// File to play, pcap or pcapng; nothing arrives without one.
    pub input: Option<PathBuf>,
    /// File to write what is transmitted to, as pcap with nanoseconds; one that is there is replaced. Without one it
    /// goes nowhere.
    pub output: Option<PathBuf>,
    /// How often to play.
    pub rounds: Rounds,
    /// How fast to play.
    pub pace: Pace,
    /// Play packets of which only the first bytes were recorded.
    pub partial: bool,
    /// Packets in several frames, for those that a frame cannot hold.
    pub multi_buffer: bool,
    /// Largest file to play, in bytes: it is held in locked memory.
    pub max_bytes: u64,
    /// Room for packets that wait to be written, in cells of 64 bytes: a power of two. While there is none, packets
    /// stay with the worker.
    pub cells: u32,
}

impl PcapConfig {
    /// Plays `input` once, fast, up to 256 MiB; 4 MiB for packets that wait to be written.
    #[must_use]
    pub fn new(name: &str, input: Option<&Path>, output: Option<&Path>) -> Self {
        Self {
            name: name.to_owned(),
            input: input.map(Path::to_owned),
            output: output.map(Path::to_owned),
            rounds: Rounds::Once,
            pace: Pace::Fast,
            partial: false,
            multi_buffer: false,
            max_bytes: 256 << 20,
            cells: 65_536,
        }
    }

    /// `IN,OUT`, either of which may be empty; the name is the same.
    pub(crate) fn parse(text: &str) -> Self {
        let (input, output) = text.split_once(',').unwrap_or((text, ""));
        let path = |name| Some(Path::new(name)).filter(|path| !path.as_os_str().is_empty());
        Self::new(text, path(input), path(output))
    }
}

/// A port that plays one file and writes another. See the [module](super).
///
/// Close its queue ([`Queue::close`]) before it is dropped: then all that was transmitted is in the file.
#[derive(Debug)]
pub struct PcapPort {
    config: PcapConfig,
    pool: Arc<Pool>,
    film: Option<Film>,
    writer: Option<Arc<Mutex<Writer>>>,
    descriptor: Option<RawFd>,
    queue: Option<Queue>,
    opener: nix::unistd::Pid,
}

impl PcapPort {
    /// Reads the file to play, and makes the one to write.
    ///
    /// # Errors
    /// See [`PcapError`].
    pub fn open(pool: &Arc<Pool>, config: &PcapConfig) -> Result<Self, PcapError> {
        if config.input.is_none() && config.output.is_none() {
            return Err(PcapError::NoFile);
        }
        let film = config.input.as_deref().map(|path| load(path, pool, config)).transpose()?;
        let clock = match config.pace {
            Pace::Fast => None,
            Pace::Original => Some(Clock::tsc()?),
        };
        let mut descriptor = None;
        let output = match &config.output {
            None => None,
            Some(path) => {
                let file = create(path, config.input.as_deref())?;
                descriptor = Some(file.as_raw_fd());
                let ring = CaptureConfig { cells: config.cells, ..CaptureConfig::whole(&config.name) };
                let (recorder, records) = capture(&ring)?;
                let writer =
                    Writer::new(file, records).map_err(PcapError::file(path, "writing its header"))?;
                Some((recorder, Arc::new(Mutex::new(writer))))
            }
        };
        let writer = output.as_ref().map(|(_, writer)| Arc::clone(writer));
        let again = config.rounds == Rounds::Forever;
        let show = film.clone().map(|film| Show { film, again, clock });
        let queue = Queue { rx: PcapRx::new(show, pool).into(), tx: PcapTx::new(output, pool).into() };
        Ok(Self {
            config: config.clone(),
            pool: Arc::clone(pool),
            film,
            writer,
            descriptor,
            queue: Some(queue),
            opener: nix::unistd::getpid(),
        })
    }

    /// Packets of the file to play.
    #[must_use]
    pub fn packets(&self) -> u64 {
        self.film.as_ref().map_or(0, Film::packets)
    }

    /// Packets that the worker has taken, over all rounds.
    #[must_use]
    pub fn played(&self) -> u64 {
        self.film.as_ref().map_or(0, Film::played)
    }

    /// Has all been played that will be?
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.config.rounds == Rounds::Once && self.played() >= self.packets()
    }

    /// Packets written by this process; those that wait are not counted.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.with_writer(|writer| writer.counts().0)
    }

    fn with_writer(&self, ask: impl FnOnce(&Writer) -> u64) -> u64 {
        let writer = self.writer.as_ref();
        writer.map_or(0, |writer| ask(&writer.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn load(path: &Path, pool: &Pool, config: &PcapConfig) -> Result<Film, PcapError> {
    let most = config.max_bytes;
    let file = File::open(path).map_err(PcapError::file(path, "opening it"))?;
    let mut bytes = Vec::new();
    // One more than allowed: a pipe has no size to ask for.
    let read = file.take(most.saturating_add(1)).read_to_end(&mut bytes);
    let read = read.map_err(PcapError::file(path, "reading it"))? as u64;
    if read > most {
        let size = std::fs::metadata(path).map_or(read, |data| data.len().max(read));
        return Err(PcapError::TooLarge { path: path.to_owned(), bytes: size, most });
    }
    let recording = Recording::parse(&bytes, config.partial)
        .map_err(|source| PcapError::Recording { path: path.to_owned(), source })?;
    if recording.packets.is_empty() {
        return Err(PcapError::Empty { path: path.to_owned() });
    }
    let (frames, room) = (if config.multi_buffer { BATCH } else { 1 }, pool.max_frame());
    for (number, packet) in (1..).zip(&recording.packets) {
        let len = packet.bytes.len();
        if len > frames * room as usize {
            return Err(PcapError::TooLong { path: path.to_owned(), number, len, frames, room });
        }
    }
    Ok(Film::new(&config.name.replace('/', "-"), &recording)?)
}

/// Makes the file to write, which must not be the one that is played.
fn create(path: &Path, input: Option<&Path>) -> Result<File, PcapError> {
    let identity = |path: &Path| std::fs::metadata(path).map(|data| (data.dev(), data.ino())).ok();
    if identity(path).is_some_and(|there| input.and_then(identity) == Some(there)) {
        return Err(PcapError::SameFile { path: path.to_owned() });
    }
    File::create(path).map_err(PcapError::file(path, "making it"))
}

impl Port for PcapPort {
    fn name(&self) -> &str {
        &self.config.name
    }
    fn driver(&self) -> &'static str {
        "pcap"
    }
    fn capabilities(&self) -> Capabilities {
        let mut can = Capabilities::MULTI_BUFFER;
        if self.writer.is_some() {
            can |= Capabilities::KICKS;
        }
        can
    }
    fn mac(&self) -> Option<[u8; 6]> {
        None
    }
    fn max_frame(&self) -> u32 {
        self.pool.max_frame()
    }
    fn link(&self) -> LinkState {
        LinkState::Up
    }
    fn statistics(&self) -> PortStatistics {
        PortStatistics {
            bad_descriptors: self.with_writer(Writer::damaged),
            kicks: self.with_writer(|writer| writer.counts().1),
            kick_errors: self.with_writer(|writer| writer.counts().2),
            ..PortStatistics::default()
        }
    }
    fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
    fn queues(&self) -> u16 {
        1
    }
    fn take_queue(&mut self, index: u16) -> Option<Queue> {
        if index == 0 { self.queue.take() } else { None }
    }
    fn kick_target(&self, index: u16) -> Option<Box<dyn KickTarget>> {
        let writer = self.writer.as_ref().filter(|_| index == 0)?;
        Some(Box::new(PcapKick::new(writer)))
    }
    fn descriptors(&self) -> Vec<(Option<u16>, RawFd)> {
        self.descriptor.iter().map(|fd| (Some(0), *fd)).collect()
    }
}

impl Drop for PcapPort {
    fn drop(&mut self) {
        if nix::unistd::getpid() != self.opener {
            return;
        }
        if let Some(queue) = self.queue.take() {
            queue.close();
        }
        let Some(writer) = &self.writer else { return };
        let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match writer.some() {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(port = self.config.name, "the last packets could not be written: {error}");
                    return;
                }
            }
        }
    }
}
