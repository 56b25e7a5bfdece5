//! Digests that name things: short, the same everywhere, and no protection against somebody who wants two to be alike.

/// 64-bit FNV-1a (Fowler, Noll and Vo).
///
/// ```
/// assert_eq!(qcompile_ir::fnv1a("foobar".bytes()), 0x8594_4171_f739_67e8);
/// ```
#[must_use]
pub fn fnv1a(bytes: impl IntoIterator<Item = u8>) -> u64 {
    let add = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, add)
}
