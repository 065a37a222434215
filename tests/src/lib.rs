//! What tests of the built system share.
