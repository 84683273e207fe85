//! Typed messages between a program and one of its apps.
//!
//! Contract: two single-producer single-consumer rings in shared memory, made before the fork, one
//! each way. Messages are plain old data, copied whole; neither side ever waits: a full ring gives the
//! message back, an empty one gives nothing. Messages survive the death of the worker: the next one
//! goes on reading where the last one stopped. What is not plain old data is serialised by the
//! program into a [`Blob`].

use bytemuck::{Pod, Zeroable};
use isoplane_memory::ring::{Consumer, Mapped, Producer, RingError, bytes_for};
use isoplane_memory::{Region, RegionConfig, RegionError};

/// Why a mailbox could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MailboxError {
    /// Capacity or size.
    #[error("mailbox {name:?}: {source}")]
    Ring {
        /// Name of the mailbox.
        name: String,
        /// What is wrong.
        source: RingError,
    },
    /// The memory behind it.
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// The program's end: sends `ToApp`, receives `FromApp`.
#[derive(Debug)]
pub struct Mailbox<ToApp: Pod, FromApp: Pod> {
    out: Producer<ToApp>,
    into: Consumer<FromApp>,
}

/// The app's end, before there is an app: captured by the closure that builds the app, which calls
/// [`AppMailbox::open`] each time a worker starts.
#[derive(Debug)]
pub struct AppMailbox<ToApp: Pod, FromApp: Pod> {
    into: Mapped<ToApp>,
    out: Mapped<FromApp>,
}

/// The app's end, in the app.
#[derive(Debug)]
pub struct AppEnd<ToApp: Pod, FromApp: Pod> {
    into: Consumer<ToApp>,
    out: Producer<FromApp>,
}

/// The two ends of a mailbox.
pub type Ends<ToApp, FromApp> = (Mailbox<ToApp, FromApp>, AppMailbox<ToApp, FromApp>);

/// Makes a mailbox for `capacity` messages (a power of two) each way.
///
/// # Errors
/// See [`MailboxError`].
pub fn mailbox<ToApp: Pod, FromApp: Pod>(
    name: &str,
    capacity: u32,
) -> Result<Ends<ToApp, FromApp>, MailboxError> {
    let ring = |source| MailboxError::Ring { name: name.to_owned(), source };
    if !capacity.is_power_of_two() || capacity > 1 << 20 {
        return Err(ring(RingError::Capacity { capacity }));
    }
    let second = bytes_for::<ToApp>(capacity).next_multiple_of(128);
    let bytes = second + bytes_for::<FromApp>(capacity);
    let region = Region::create(&RegionConfig::new(&format!("isoplane.mailbox.{name}"), bytes))?;
    let to_app = Mapped::<ToApp>::create(&region, 0, capacity).map_err(ring)?;
    let from_app = Mapped::<FromApp>::create(&region, second, capacity).map_err(ring)?;
    let app = AppMailbox { into: to_app.share(), out: from_app.share() };
    Ok((Mailbox { out: Producer::new(to_app), into: Consumer::new(from_app) }, app))
}

impl<ToApp: Pod, FromApp: Pod> Mailbox<ToApp, FromApp> {
    /// Sends a message.
    ///
    /// # Errors
    /// Gives it back when the app has not read the ones before.
    pub fn send(&mut self, message: ToApp) -> Result<(), ToApp> {
        self.out.push(message)
    }

    /// The next message of the app.
    pub fn receive(&mut self) -> Option<FromApp> {
        self.into.pop()
    }
}

impl<ToApp: Pod, FromApp: Pod> AppMailbox<ToApp, FromApp> {
    /// Takes the app's end over, where the last worker left it.
    #[must_use]
    pub fn open(&self) -> AppEnd<ToApp, FromApp> {
        AppEnd { into: Consumer::new(self.into.share()), out: Producer::new(self.out.share()) }
    }
}

impl<ToApp: Pod, FromApp: Pod> AppEnd<ToApp, FromApp> {
    /// Sends a message to the program.
    ///
    /// # Errors
    /// Gives it back when the program has not read the ones before.
    #[inline]
    pub fn send(&mut self, message: FromApp) -> Result<(), FromApp> {
        self.out.push(message)
    }

    /// The program's next message.
    #[inline]
    pub fn receive(&mut self) -> Option<ToApp> {
        self.into.pop()
    }
}

/// Up to `N - 2` bytes of anything, as a message: what a program has serialised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Blob<const N: usize>([u8; N]);

impl<const N: usize> Blob<N> {
    /// Packs bytes; `None` when there are more than `N - 2`.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut blob = Self([0; N]);
        let len = u16::try_from(bytes.len()).ok()?;
        blob.0.get_mut(..2)?.copy_from_slice(&len.to_le_bytes());
        blob.0.get_mut(2..2 + bytes.len())?.copy_from_slice(bytes);
        Some(blob)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        let (Some(low), Some(high)) = (self.0.first(), self.0.get(1)) else { return &[] };
        let len = usize::from(u16::from_le_bytes([*low, *high]));
        // A length that lies is cut to what there is.
        let end = (2 + len).min(N);
        &self.0[2..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_and_full_and_over_a_restart() {
        let (mut program, app) = mailbox::<u64, [u32; 3]>("test", 4).unwrap();
        let mut first = app.open();
        for n in 0..4 {
            program.send(n).unwrap();
        }
        assert_eq!(program.send(9), Err(9));
        assert_eq!(first.receive(), Some(0));
        first.send([1, 2, 3]).unwrap();
        // The worker dies; its successor goes on.
        let mut second = app.open();
        second.send([4, 5, 6]).unwrap();
        assert_eq!((second.receive(), second.receive()), (Some(1), Some(2)));
        assert_eq!((program.receive(), program.receive()), (Some([1, 2, 3]), Some([4, 5, 6])));
        assert_eq!(program.receive(), None);
    }

    #[test]
    fn blobs_carry_what_fits() {
        assert_eq!(Blob::<8>::new(b"123456").unwrap().bytes(), b"123456");
        assert_eq!(Blob::<8>::new(b"1234567"), None);
        assert_eq!(Blob::<1>::new(b""), None);
        let lie: Blob<4> = bytemuck::cast([255u8, 255, 1, 2]);
        assert_eq!(lie.bytes(), [1, 2]);
    }

    #[test]
    fn capacity_is_checked() {
        let error = mailbox::<u64, u64>("odd", 3).unwrap_err();
        assert!(error.to_string().contains("odd"), "{error}");
    }
}
