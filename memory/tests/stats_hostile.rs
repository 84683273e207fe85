//! What a reader makes of statistics segments that no builder made. `isoplane top` usually runs as root,
//! and any local user can make a segment. The bytes are laid out here by hand, from the layout's description.

use isoplane_memory::stats::{Field, SegmentBuilder, SegmentReader, StatsError, VERSION, find};
use isoplane_memory::{Region, RegionConfig};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

/// A block: worker, port, first field, number of fields, place of the values.
type BlockLine<'a> = (&'a [u8], &'a [u8], u32, u32, u64);

/// A segment in bytes.
struct Handmade {
    version: u32,
    name: Vec<u8>,
    blocks: Vec<Vec<u8>>,
    fields: Vec<Vec<u8>>,
    values: Vec<u64>,
}

const HEADER: usize = 128;

impl Handmade {
    fn new() -> Self {
        Self { version: VERSION, name: b"handmade".to_vec(), blocks: vec![], fields: vec![], values: vec![] }
    }

    fn block(&mut self, (worker, port, first, count, at): BlockLine<'_>) -> &mut Self {
        let mut record = vec![0; 80];
        record[..worker.len()].copy_from_slice(worker);
        record[32..32 + port.len()].copy_from_slice(port);
        record[64..68].copy_from_slice(&first.to_ne_bytes());
        record[68..72].copy_from_slice(&count.to_ne_bytes());
        record[72..].copy_from_slice(&at.to_ne_bytes());
        self.blocks.push(record);
        self
    }

    fn field(&mut self, name: &[u8], words: u32) -> &mut Self {
        let mut record = vec![0; 48];
        record[..name.len()].copy_from_slice(name);
        record[44..].copy_from_slice(&words.to_ne_bytes());
        self.fields.push(record);
        self
    }

    /// Where the values begin.
    fn values_at(&self) -> u64 {
        (HEADER + self.blocks.len() * 80 + self.fields.len() * 48).next_multiple_of(64) as u64
    }

    fn region(&self) -> Arc<Region> {
        let fields_at = HEADER + self.blocks.len() * 80;
        let mut bytes = b"ISOSTATS".to_vec();
        bytes.extend(self.version.to_ne_bytes());
        bytes.extend(std::process::id().to_ne_bytes());
        bytes.extend(0_u64.to_ne_bytes());
        bytes.extend((self.blocks.len() as u32).to_ne_bytes());
        bytes.extend((self.fields.len() as u32).to_ne_bytes());
        bytes.extend((HEADER as u64).to_ne_bytes());
        bytes.extend((fields_at as u64).to_ne_bytes());
        bytes.extend(&self.name);
        bytes.resize(HEADER, 0);
        bytes.extend(self.blocks.concat());
        bytes.extend(self.fields.concat());
        bytes.resize(self.values_at() as usize, 0);
        bytes.extend(self.values.iter().flat_map(|value| value.to_ne_bytes()));
        let region = Region::create(&RegionConfig::new("isoplane.stats.handmade", bytes.len())).unwrap();
        File::from(descriptor(&region)).write_all_at(&bytes, 0).unwrap();
        region
    }

    fn attach(&self) -> Result<SegmentReader, StatsError> {
        SegmentReader::attach(descriptor(&self.region()))
    }
}

fn descriptor(region: &Region) -> OwnedFd {
    region.as_fd().try_clone_to_owned().unwrap()
}

/// One block with the given values, each a field of its own.
fn plain(name: &[u8], values: &[u64]) -> Handmade {
    let mut segment = Handmade::new();
    for _ in values {
        segment.field(name, 1);
    }
    segment.block((b"w0", b"eth0", 0, values.len() as u32, 0));
    let at = segment.values_at();
    segment.blocks.clear();
    segment.block((b"w0", b"eth0", 0, values.len() as u32, at));
    segment.values = values.to_vec();
    segment
}

#[test]
fn the_layout_is_the_one_described() {
    let reader = plain(b"rx_frames", &[7, 8]).attach().unwrap();
    let rows = reader.rows();
    assert_eq!((reader.name(), reader.pid()), ("handmade", std::process::id()));
    assert_eq!(rows.len(), 2);
    assert_eq!((&*rows[1].worker, &*rows[1].port, &*rows[1].name), ("w0", "eth0", "rx_frames"));
    assert_eq!(rows[1].values, [8]);
    assert_eq!(reader.total("rx_frames"), 15);
}

#[test]
fn another_version_is_refused_by_its_number() {
    for version in [0, VERSION + 1, u32::MAX] {
        let segment = Handmade { version, ..plain(b"rx_frames", &[7]) };
        let error = segment.attach().unwrap_err();
        assert!(matches!(error, StatsError::Version { found } if found == version), "{error}");
        let said = error.to_string();
        assert!(said.contains(&format!("version {version}")) && said.contains("isoplane"), "{said}");
    }
}

#[test]
fn blocks_may_not_name_the_same_fields() {
    let mut segment = Handmade::new();
    for _ in 0..2000 {
        segment.field(b"x", 1);
    }
    for _ in 0..8000 {
        segment.block((b"w0", b"", 0, 2000, 0));
    }
    let error = segment.attach().unwrap_err();
    assert!(matches!(error, StatsError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("more fields than there are"), "{error}");
}

#[test]
fn fields_may_not_have_more_values_than_there_is_room_for() {
    // Each lies inside the segment, all of them together do not: blocks that share their values.
    let mut segment = Handmade::new();
    for at in 0..600 {
        segment.field(b"x", 4096);
        segment.block((b"w0", b"", at, 1, 0));
    }
    segment.values = vec![1; 4096];
    let error = segment.attach().unwrap_err();
    assert!(matches!(error, StatsError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("more values"), "{error}");
}

#[test]
fn more_records_than_a_reader_holds_are_refused_by_both_sides() {
    let mut segment = Handmade::new();
    segment.fields = vec![vec![0; 48]; (1 << 15) + 1];
    let error = segment.attach().unwrap_err();
    assert!(matches!(error, StatsError::TooLarge { what: "fields", .. }), "{error}");
    let mut builder = SegmentBuilder::default();
    builder.block("w0", "", &vec![Field::counter("x"); (1 << 15) + 1]);
    let error = builder.build("large").unwrap_err();
    assert!(matches!(error, StatsError::TooLarge { what: "fields", .. }), "{error}");
}

#[test]
fn a_huge_sparse_segment_is_refused_before_it_is_mapped() {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let sparse = |bytes: i64| {
        let fd = memfd_create(c"isoplane.stats.sparse", flags).unwrap();
        nix::unistd::ftruncate(&fd, bytes).unwrap();
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW)).unwrap();
        fd
    };
    let error = SegmentReader::attach(sparse(1 << 42)).unwrap_err();
    assert!(
        matches!(error, StatsError::TooLarge { what: "bytes", found, .. } if found == 1 << 42),
        "{error}"
    );
    // One that is not too large costs no more pages than are looked at.
    let fd = sparse(64 << 20);
    let again = fd.try_clone().unwrap();
    assert!(matches!(SegmentReader::attach(fd), Err(StatsError::NotASegment)));
    let pages = nix::sys::stat::fstat(&again).unwrap().st_blocks / 8;
    // A kernel that gives huge pages to shared memory gives one.
    assert!(pages <= 512, "{pages} pages for a header");
}

#[test]
fn labels_cannot_steer_a_terminal() {
    let mut segment = plain(b"x\x1b]0;title\x07y", &[1]);
    segment.name = b"na\x1b[2Jme\r\n".to_vec();
    let at = segment.values_at();
    segment.blocks.clear();
    segment.block((b"w\x1b[31m\x7f", "p\u{9b}1\u{202e}q".as_bytes(), 0, 1, at));
    let reader = segment.attach().unwrap();
    let row = &reader.rows()[0];
    assert_eq!(reader.name(), "na\u{fffd}[2Jme\u{fffd}\u{fffd}");
    assert_eq!(row.worker, "w\u{fffd}[31m\u{fffd}");
    assert_eq!(row.port, "p\u{fffd}1\u{fffd}q");
    assert_eq!(row.name, "x\u{fffd}]0;title\u{fffd}y");
}

#[test]
fn totals_wrap_like_the_counters_they_add_up() {
    let reader = plain(b"x", &[u64::MAX, 3]).attach().unwrap();
    assert_eq!(reader.total("x"), 2);
}

#[test]
fn a_fifo_or_a_device_of_that_name_is_not_opened() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a detached file system, where a file can have a memfd's name, needs root");
        return;
    }
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use nix::sched::{CloneFlags, unshare};
    // In a file system that is mounted nowhere any more, a file's path is what its owner likes.
    let held = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("tmpfs"), "/tmp", Some("tmpfs"), MsFlags::empty(), none).unwrap();
        let path = "/tmp/memfd:isoplane.stats.fifo";
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
        let fifo = nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty()).unwrap();
        umount2("/tmp", MntFlags::MNT_DETACH).unwrap();
        fifo
    });
    let fifo = held.join().unwrap();
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fifo.as_raw_fd())).unwrap();
    assert_eq!(link.to_str(), Some("/memfd:isoplane.stats.fifo"), "the test's own ground");
    let (done, wait) = channel();
    std::thread::spawn(move || done.send(find(Some("fifo")).unwrap().len()));
    assert_eq!(wait.recv_timeout(Duration::from_secs(60)), Ok(0), "waits for a writer that never comes");
}
