//! Reusable forwarding steps. Each is an [`App`](crate::App), or can be called from one.

pub mod bridge;
pub mod cross_connect;
pub mod host;
pub mod router;

pub use bridge::{Bridge, BridgeConfig};
pub use cross_connect::CrossConnect;
pub use host::{Host, HostConfig};
pub use router::{Router, RouterConfig};
