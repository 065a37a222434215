//! Addresses as text: networks and MAC addresses.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The error for a text that is not a network or MAC address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct ParseAddressError {
    /// The text.
    pub text: String,
    /// The expected form, with an example.
    pub expected: &'static str,
}

/// A network: `10.77.0.0/16`, `fd00:77::/64`. The bits after the prefix are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// Returns the network of this address; `None` if the prefix is longer than the address. Bits after the prefix are cleared.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let address = match address {
            IpAddr::V4(v4) if prefix <= 32 => {
                let kept = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V4((u32::from(v4) & kept).into())
            }
            IpAddr::V6(v6) if prefix <= 128 => {
                let kept = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V6((u128::from(v6) & kept).into())
            }
            IpAddr::V4(_) | IpAddr::V6(_) => return None,
        };
        Some(Self { address, prefix })
    }

    /// Returns the first address.
    pub const fn address(self) -> IpAddr {
        self.address
    }

    /// Returns the last address.
    pub fn last(self) -> IpAddr {
        match self.address {
            IpAddr::V4(v4) => {
                IpAddr::V4((u32::from(v4) | u32::MAX.checked_shr(self.prefix.into()).unwrap_or(0)).into())
            }
            IpAddr::V6(v6) => {
                IpAddr::V6((u128::from(v6) | u128::MAX.checked_shr(self.prefix.into()).unwrap_or(0)).into())
            }
        }
    }

    /// Returns the length of the prefix, in bits.
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// Returns whether an address is in it.
    pub fn contains(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && Self::new(address, self.prefix) == Some(self)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        let parse = || {
            let (address, prefix) = text.split_once('/')?;
            let address: IpAddr = address.parse().ok()?;
            Self::new(address, prefix.parse().ok()?).filter(|cidr| cidr.address == address)
        };
        parse().ok_or_else(|| ParseAddressError {
            text: text.to_owned(),
            expected: "a network such as 10.77.0.0/16",
        })
    }
}

/// A MAC address: `02:4e:00:00:01:0a`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, ParseAddressError> {
        let parse = || {
            let mut bytes = [0; 6];
            let mut parts = text.split(':');
            for byte in &mut bytes {
                let part = parts.next().filter(|part| part.len() == 2)?;
                *byte = u8::from_str_radix(part, 16).ok()?;
            }
            parts.next().is_none().then_some(Self(bytes))
        };
        parse().ok_or_else(|| ParseAddressError {
            text: text.to_owned(),
            expected: "a MAC address such as 02:4e:00:00:01:0a",
        })
    }
}

/// Serializes a type as its text.
macro_rules! as_text {
    ($($type:ty),*) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

as_text!(Cidr, Mac, crate::InstanceId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_have_addresses_and_no_bits_behind_the_prefix() {
        let net: Cidr = "10.77.0.0/16".parse().unwrap();
        assert_eq!(net.to_string(), "10.77.0.0/16");
        assert!(net.contains("10.77.255.255".parse().unwrap()));
        assert!(!net.contains("10.78.0.0".parse().unwrap()) && !net.contains("fd00::".parse().unwrap()));
        let net: Cidr = "fd00:77::/64".parse().unwrap();
        assert!(
            net.contains("fd00:77::ffff".parse().unwrap()) && !net.contains("fd00:78::".parse().unwrap())
        );
        for wrong in ["10.77.0.1/16", "10.77.0.0", "10.77.0.0/33", "::/129", "x/8", "10.0.0.0/"] {
            assert!(wrong.parse::<Cidr>().is_err(), "{wrong}");
        }
        assert!("0.0.0.0/0".parse::<Cidr>().unwrap().contains("8.8.8.8".parse().unwrap()));
    }

    #[test]
    fn mac_addresses_have_six_bytes() {
        assert_eq!("02:4E:00:00:01:0a".parse::<Mac>().unwrap().to_string(), "02:4e:00:00:01:0a");
        for wrong in ["", "02:4e:00:00:01", "02:4e:00:00:01:0a:00", "2:4e:00:00:01:0a", "02:4e:00:00:01:zz"] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }
}
