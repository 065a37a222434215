//! The whole chain against archives that the tests make and really sign.

mod real;
