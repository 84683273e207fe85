//! The kinds of values that a configuration file has, each with what is expected of it.

use super::reader::{Change, Section, Value, Wrong, kind, one_of};
use super::source::At;
use isoplane::wire::{MacAddress, VlanId};
use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::time::Duration;
use toml::de::DeValue;

/// A value of the wrong type.
fn wrong_type<T>(value: &Value<'_>) -> Result<T, Vec<Wrong>> {
    Err(vec![format!("is {}", kind(value)).into()])
}

/// The number in a value.
pub(crate) fn integer(value: &Value<'_>) -> Result<i128, Vec<Wrong>> {
    let Some(integer) = value.get_ref().as_integer() else { return wrong_type(value) };
    i128::from_str_radix(integer.as_str(), integer.radix())
        .map_err(|_| vec![format!("is {}, which is beyond all numbers", integer.as_str()).into()])
}

/// A number in a range.
pub(crate) fn number<T>(value: &Value<'_>, range: &RangeInclusive<T>) -> Result<T, Vec<Wrong>>
where
    T: TryFrom<i128> + PartialOrd,
{
    let number = integer(value)?;
    match T::try_from(number) {
        Ok(number) if range.contains(&number) => Ok(number),
        _ => Err(vec![format!("is {number}").into()]),
    }
}

pub(crate) fn string<'t>(value: &'t Value<'t>) -> Result<&'t str, Vec<Wrong>> {
    value.get_ref().as_str().map_or_else(|| wrong_type(value), Ok)
}

/// A name: of a dataplane, a port or a worker.
pub(crate) fn name(value: &Value<'_>) -> Result<String, Vec<Wrong>> {
    let name = string(value)?;
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':' | '@');
    if (1..=32).contains(&name.len()) && name.chars().all(good) {
        return Ok(name.to_owned());
    }
    Err(vec![format!("is {name:?}").into()])
}

/// What a name may be.
pub(crate) const NAME: &str = "1 to 32 letters, digits or any of . _ - : @";

pub(crate) fn mac(value: &Value<'_>) -> Result<MacAddress, Vec<Wrong>> {
    let text = string(value)?;
    match text.parse::<MacAddress>() {
        Ok(mac) if mac.is_station() => Ok(mac),
        Ok(_) => Err(vec![format!("is {text:?}, which no station can have").into()]),
        Err(_) => Err(vec![format!("is {text:?}").into()]),
    }
}

/// What an address of a station may be.
pub(crate) const MAC: &str = "a station's MAC address such as \"02:00:00:00:00:01\"";

pub(crate) fn vlan(value: &Value<'_>) -> Result<VlanId, Vec<Wrong>> {
    let number = integer(value)?;
    u16::try_from(number).ok().and_then(VlanId::new).ok_or_else(|| vec![format!("is {number}").into()])
}

/// What a VLAN may be.
pub(crate) const VLAN: &str = "a VLAN from 1 to 4094";

/// The items of an array.
pub(crate) fn items<'t>(value: &'t Value<'t>) -> Result<&'t [Value<'t>], Vec<Wrong>> {
    match value.get_ref() {
        DeValue::Array(items) => Ok(items),
        _ => wrong_type(value),
    }
}

/// An array, all of whose items are read; what is wrong with any of them is said.
pub(crate) fn list<'t, T>(
    value: &'t Value<'t>,
    read: impl Fn(&'t Value<'t>) -> Result<T, Vec<Wrong>>,
) -> Result<Vec<T>, Vec<Wrong>> {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for item in items(value)? {
        match read(item) {
            Ok(item) => good.push(item),
            Err(wrong) => bad.extend(wrong.into_iter().map(|wrong| wrong.of_item(item.span()))),
        }
    }
    if bad.is_empty() { Ok(good) } else { Err(bad) }
}

/// Settings by their kind; each of these reads a key with a default.
impl<'t> Section<'_, 't> {
    pub(crate) fn number<T>(
        &mut self,
        key: &'static str,
        change: Change,
        range: RangeInclusive<T>,
        default: T,
    ) -> At<T>
    where
        T: TryFrom<i128> + PartialOrd + Debug,
    {
        let expected = format!("a number from {:?} to {:?}", range.start(), range.end());
        self.setting(key, change, &expected, default, |value| number(value, &range))
    }

    /// A number that may be absent.
    pub(crate) fn maybe_number<T>(
        &mut self,
        key: &'static str,
        change: Change,
        range: RangeInclusive<T>,
    ) -> Option<At<T>>
    where
        T: TryFrom<i128> + PartialOrd + Debug,
    {
        let expected = format!("a number from {:?} to {:?}", range.start(), range.end());
        let At { value, span } =
            self.setting(key, change, &expected, None, |value| number(value, &range).map(Some));
        value.map(|value| At { value, span })
    }

    pub(crate) fn power_of_two(
        &mut self,
        key: &'static str,
        change: Change,
        range: RangeInclusive<u32>,
    ) -> Option<At<u32>> {
        let expected = format!("a power of two from {} to {}", range.start(), range.end());
        let At { value, span } = self.setting(key, change, &expected, None, |value| {
            let size: u32 = number(value, &range)?;
            if size.is_power_of_two() { Ok(Some(size)) } else { Err(vec![format!("is {size}").into()]) }
        });
        value.map(|value| At { value, span })
    }

    pub(crate) fn flag(&mut self, key: &'static str, change: Change, default: bool) -> At<bool> {
        self.setting(key, change, "true or false", default, |value| {
            value.get_ref().as_bool().map_or_else(|| wrong_type(value), Ok)
        })
    }

    /// A length of time.
    pub(crate) fn time(
        &mut self,
        key: &'static str,
        change: Change,
        range: RangeInclusive<Duration>,
        default: Duration,
    ) -> At<Duration> {
        let [least, most] = [range.start(), range.end()].map(|end| humantime::format_duration(*end));
        let expected = format!("a time from \"{least}\" to \"{most}\", such as \"30s\"");
        self.setting(key, change, &expected, default, |value| {
            let text = string(value)?;
            match humantime::parse_duration(text) {
                Ok(time) if range.contains(&time) => Ok(time),
                _ => Err(vec![format!("is {text:?}").into()]),
            }
        })
    }

    /// One of several words, each with what it means.
    pub(crate) fn word<T: Debug + Clone>(
        &mut self,
        key: &'static str,
        change: Change,
        words: &[(&'static str, T)],
        default: T,
    ) -> At<T> {
        let names: Vec<&str> = words.iter().map(|(name, _)| *name).collect();
        let expected = one_of(&names).replace('`', "\"");
        let found = self.read(key, &expected, |value| {
            let text = string(value)?;
            let found = words.iter().find(|(name, _)| *name == text);
            found.cloned().ok_or_else(|| vec![format!("is {text:?}").into()])
        });
        // In messages it is called what the file calls it.
        let meant = format!("{default:?}");
        let called = words.iter().find(|(_, meaning)| format!("{meaning:?}") == meant).map(|(name, _)| *name);
        let span = self.span();
        let At { value: (name, value), span } =
            found.unwrap_or(At { value: (called.unwrap_or("default"), default), span });
        self.note(key, &name, change);
        At { value, span }
    }
}
