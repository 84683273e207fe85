//! Domains over an IOMMU that only takes notes.

use super::*;
use isoplane_memory::PoolConfig;
use std::fs::{self, File};

type Notes = Arc<Mutex<Vec<String>>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mood {
    Willing,
    RefusesMapping,
    HoldsOn,
    TranslatesNothing,
}

#[derive(Debug)]
struct Fake {
    notes: Notes,
    mood: Arc<Mutex<Mood>>,
}

impl Fake {
    fn mood(&self) -> Mood {
        *self.mood.lock().unwrap()
    }
}

const FIRST: u64 = 1 << 24;
const LAST: u64 = FIRST + (64 << 20) - 1;

impl Iommu for Fake {
    fn open(&self, _: &Host, address: &str) -> Result<OwnedFd, VfioError> {
        self.notes.lock().unwrap().push(format!("open {address}"));
        Ok(File::open("/dev/null").unwrap().into())
    }

    fn limits(&self) -> Result<Option<Limits>, VfioError> {
        let limits = Limits { ranges: vec![FIRST..=LAST], page: 4096 };
        Ok((self.mood() != Mood::TranslatesNothing).then_some(limits))
    }

    unsafe fn map(&self, span: Span<'_>, iova: u64) -> Result<u64, DmaError> {
        match self.mood() {
            Mood::RefusesMapping => Err(DmaError::NoAddresses { name: span.name.into(), bytes: span.bytes }),
            Mood::TranslatesNothing => Ok(0x1234_0000),
            _ => {
                self.notes.lock().unwrap().push(format!("map {} {iova:#x} {:#x}", span.name, span.bytes));
                Ok(iova)
            }
        }
    }

    fn unmap(&self, iova: u64, bytes: u64) -> bool {
        self.notes.lock().unwrap().push(format!("unmap {iova:#x} {bytes:#x}"));
        self.mood() != Mood::HoldsOn
    }

    fn descriptors(&self) -> Vec<RawFd> {
        Vec::new()
    }
}

/// A domain with a device in it; what is done to its IOMMU, and how that feels.
fn domain(mood: Mood, process: u32) -> (Arc<Domain>, Notes, Arc<Mutex<Mood>>) {
    let (notes, mood) = (Notes::default(), Arc::new(Mutex::new(mood)));
    let fake = Fake { notes: Arc::clone(&notes), mood: Arc::clone(&mood) };
    let addresses = (fake.mood() != Mood::TranslatesNothing).then(|| Allocator::new(&[]));
    let state = State { addresses, page: 4096, pools: Vec::new(), kept: Vec::new() };
    let iommu = Box::new(fake);
    let domain = Arc::new(Domain { host: Host::default(), state: Mutex::new(state), iommu, process });
    domain.open("a device").unwrap();
    notes.lock().unwrap().clear();
    (domain, notes, mood)
}

fn taken(notes: &Notes) -> Vec<String> {
    std::mem::take(&mut *notes.lock().unwrap())
}

/// Is memory of this name mapped here?
fn mapped(name: &str) -> bool {
    fs::read_to_string("/proc/self/maps").unwrap().contains(&format!("/memfd:{name} "))
}

fn pool(name: &str, chunks: u32) -> Arc<Pool> {
    let small = PoolConfig { huge_pages: HugePages::Never, ..PoolConfig::new(name, chunks) };
    Pool::create(&small).unwrap()
}

#[test]
fn memory_is_unmapped_before_it_goes() {
    let (domain, notes, _) = domain(Mood::Willing, std::process::id());
    let one = domain.memory("vfio-one", 100, None).unwrap();
    let two = domain.memory("vfio-two", 8192, None).unwrap();
    assert_eq!((one.iova(), one.bytes()), (FIRST, 4096));
    assert_eq!((two.iova(), two.bytes()), (FIRST + 4096, 8192));
    assert_eq!(taken(&notes), ["map vfio-one 0x1000000 0x1000", "map vfio-two 0x1001000 0x2000"]);
    assert!(mapped("vfio-one"));
    drop(one);
    assert!(!mapped("vfio-one"));
    assert_eq!(taken(&notes), ["unmap 0x1000000 0x1000"]);
    let three = domain.memory("vfio-three", 4096, None).unwrap();
    assert_eq!(three.iova(), FIRST, "its addresses can be had again");
}

#[test]
fn a_pool_is_mapped_once_for_as_long_as_somebody_needs_it() {
    let (domain, notes, _) = domain(Mood::Willing, std::process::id());
    // An odd number of chunks does not fill its last page.
    let pool = pool("vfio-pool", 1025);
    let one = domain.pool(&pool).unwrap();
    let two = domain.pool(&pool).unwrap();
    assert!(Arc::ptr_eq(&one, &two));
    // 2 MiB and half a page, so at a multiple of 2 MiB.
    assert_eq!(taken(&notes), ["map vfio-pool 0x1000000 0x201000"]);
    assert_eq!(one.start(), pool.chunks_base());
    drop(one);
    assert!(taken(&notes).is_empty());
    drop(two);
    assert_eq!(taken(&notes), ["unmap 0x1000000 0x201000"]);
    assert_eq!(domain.pool(&pool).unwrap().iova(), FIRST);
}

#[test]
fn a_refused_mapping_takes_no_addresses() {
    let (domain, notes, mood) = domain(Mood::RefusesMapping, std::process::id());
    assert!(domain.memory("vfio-refused", 4096, None).is_err());
    *mood.lock().unwrap() = Mood::Willing;
    assert_eq!(domain.memory("vfio-willing", 4096, None).unwrap().iova(), FIRST);
    let error = domain.memory("vfio-large", 128 << 20, None).unwrap_err();
    assert!(matches!(error, DmaError::NoAddresses { bytes: 134_217_728, .. }), "{error}");
    drop(notes);
}

#[test]
fn memory_that_devices_still_reach_stays() {
    let (domain, _, mood) = domain(Mood::HoldsOn, std::process::id());
    drop(domain.memory("vfio-held", 4096, None).unwrap());
    assert!(mapped("vfio-held"));
    *mood.lock().unwrap() = Mood::Willing;
    assert_ne!(domain.memory("vfio-other", 4096, None).unwrap().iova(), FIRST, "nor its addresses");
    drop(domain);
    assert!(mapped("vfio-held"));
}

#[test]
fn what_is_not_translated_stays_until_the_domain_ends() {
    let (domain, notes, _) = domain(Mood::TranslatesNothing, std::process::id());
    assert!(!domain.translates());
    let mapping = domain.pool(&pool("vfio-physical", 16)).unwrap();
    assert_eq!(mapping.iova(), 0x1234_0000);
    drop(mapping);
    assert!(mapped("vfio-physical"));
    drop(domain);
    assert!(!mapped("vfio-physical"));
    assert!(taken(&notes).is_empty());
}

#[test]
fn a_fork_unmaps_nothing() {
    let (domain, notes, _) = domain(Mood::Willing, std::process::id() + 1);
    drop(domain.memory("vfio-inherited", 4096, None).unwrap());
    assert!(taken(&notes).iter().all(|note| note.starts_with("map")));
}
