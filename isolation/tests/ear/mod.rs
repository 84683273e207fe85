//! A subscriber that keeps what it is told, by the type that it was told it in.

use std::fmt;
use std::sync::{Arc, Mutex};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) level: Level,
    pub(crate) target: String,
    pub(crate) name: String,
    pub(crate) place: (Option<String>, Option<String>, Option<u32>),
    /// Name, and type and value.
    pub(crate) fields: Vec<(String, String)>,
}

impl Heard {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

#[derive(Default)]
struct Fields(Vec<(String, String)>);

impl Fields {
    fn add(&mut self, field: &Field, kind: &str, value: impl fmt::Debug) {
        self.0.push((field.name().to_owned(), format!("{kind} {value:?}")));
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, "f64", value);
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, "i64", value);
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, "u64", value);
    }
    fn record_i128(&mut self, field: &Field, value: i128) {
        self.add(field, "i128", value);
    }
    fn record_u128(&mut self, field: &Field, value: u128) {
        self.add(field, "u128", value);
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, "bool", value);
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, "str", format_args!("{value}"));
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, "debug", value);
    }
}

/// The subscriber.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ear(Arc<Mutex<Vec<Heard>>>);

impl Ear {
    pub(crate) fn heard(&self) -> Vec<Heard> {
        self.0.lock().expect("nobody panics in here").clone()
    }
}

impl Subscriber for Ear {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event()
    }
    fn new_span(&self, _span: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}
    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let own = |text: Option<&str>| text.map(str::to_owned);
        self.0.lock().expect("nobody panics in here").push(Heard {
            level: *metadata.level(),
            target: metadata.target().to_owned(),
            name: metadata.name().to_owned(),
            place: (own(metadata.module_path()), own(metadata.file()), metadata.line()),
            fields: fields.0,
        });
    }
    fn enter(&self, _span: &span::Id) {}
    fn exit(&self, _span: &span::Id) {}
}

/// What the calling thread says in `what`.
pub(crate) fn listen(what: impl FnOnce()) -> Vec<Heard> {
    let ear = Ear::default();
    tracing::subscriber::with_default(ear.clone(), what);
    ear.heard()
}
