//! How the device spreads received packets over queues, and hashes them: the bodies of two commands.
//!
//! Contract: the key makes both directions of a flow hash alike (each 16 bits of it repeat the first, so
//! exchanging addresses and ports changes nothing), so that one worker sees both.

use super::error::VirtioError;
use super::layout::{net, spread};
use super::transport::{Transport, Window};
use crate::pci::Registers;

/// What the device can do (5.1.4).
#[derive(Debug, Clone, Copy)]
pub(super) struct Spread {
    kinds: u32,
    table: u16,
}

fn key() -> impl Iterator<Item = u8> {
    [0x6d, 0x5a].into_iter().cycle().take(spread::KEY_BYTES)
}

impl Spread {
    pub(super) fn of<R: Registers + Clone>(transport: &Transport<R>, rss: bool) -> Result<Self, VirtioError> {
        let read = |window: &Window<R>| {
            (
                window.read8(net::RSS_MAX_KEY),
                window.read16(net::RSS_MAX_TABLE),
                window.read32(net::HASH_TYPES),
            )
        };
        let (key, table, kinds) = transport.configuration(read)?;
        let absurd = |what, value| {
            let address = transport.address().to_owned();
            Err(VirtioError::Absurd { address, what, value })
        };
        if usize::from(key) < spread::KEY_BYTES {
            return absurd("the length of the hash key", key.into());
        }
        if rss && table == 0 {
            return absurd("the size of the RSS table", 0);
        }
        let kinds = kinds & spread::KINDS;
        if kinds == 0 {
            return absurd("the set of hashes that it knows", 0);
        }
        // The command takes a mask: a power of two.
        Ok(Self { kinds, table: (1 << table.max(1).ilog2()).min(spread::MOST_TABLE) })
    }

    /// Body of the command that spreads over `queues` (5.1.6.5.7.1).
    pub(super) fn rss(&self, queues: u16) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(self.kinds.to_le_bytes());
        body.extend((self.table - 1).to_le_bytes());
        // What has no hash goes to the first.
        body.extend(0_u16.to_le_bytes());
        for entry in 0..self.table {
            body.extend((entry % queues).to_le_bytes());
        }
        body.extend(queues.to_le_bytes());
        body.push(spread::KEY_BYTES as u8);
        body.extend(key());
        body
    }

    /// Body of the command that hashes and does not spread (5.1.6.5.6.4).
    pub(super) fn hash(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(self.kinds.to_le_bytes());
        body.extend([0; 8]);
        body.push(spread::KEY_BYTES as u8);
        body.extend(key());
        body
    }
}
