//! Recordings of both formats: any bytes give packets that lie in them, or an error.
#![no_main]

use isoplane_drivers::pcap::Recording;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let whole = Recording::parse(bytes, false);
    let lenient = Recording::parse(bytes, true);
    if let Ok(recording) = &lenient {
        let file = bytes.as_ptr_range();
        let mut sum = 0;
        for packet in &recording.packets {
            let packet = packet.bytes.as_ptr_range();
            assert!(packet.start >= file.start && packet.end <= file.end && packet.start < packet.end);
            sum += packet.end.addr() - packet.start.addr();
        }
        assert!(sum < bytes.len(), "packets do not overlap");
    }
    if whole.is_ok() {
        assert_eq!(whole, lenient);
    }
});
