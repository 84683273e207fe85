//! Port 0 to port 1 and back, 2 to 3 and back, and so on: the cheapest thing that forwards.

use crate::app::{App, DropReason, PortId, Turn};
use isoplane_memory::Batch;

/// Sends what arrives on an even port out of the next one, and the reverse.
#[derive(Debug, Default, Clone, Copy)]
pub struct CrossConnect;

impl App for CrossConnect {
    #[inline(always)]
    fn packets(&mut self, turn: &mut Turn<'_>, from: PortId, batch: &mut Batch) {
        let to = PortId(from.0 ^ 1);
        if to.index() < turn.ports() {
            turn.send_all(to, batch);
        } else {
            turn.drop_all(batch, DropReason::NoPort);
        }
    }

    fn wants_rehearsal(&self) -> bool {
        true
    }
}
