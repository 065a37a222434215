//! The whole chain against archives that the tests make and really sign.

mod archive;
mod chain;
mod configured;
mod hostile;
mod real;
mod releases;
mod source;
mod trust;
