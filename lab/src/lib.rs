//! A network laboratory: anonymous namespaces, veth pairs and kernel-side traffic.
#![deny(missing_docs, unsafe_code)]
