//! Reusable forwarding steps. Each is an [`App`](crate::App), or can be called from one.

pub mod cross_connect;

pub use cross_connect::CrossConnect;
