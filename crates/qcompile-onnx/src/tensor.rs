//! `TensorProto` to [`Tensor`]: every typed field, raw bytes and external data.

use crate::External;
use crate::error::Obstacle;
use onnx_protobuf::tensor_proto::DataLocation;
use onnx_protobuf::{SparseTensorProto, TensorProto};
use qcompile_ir::{DType, Tensor};

/// Names of ONNX element types by number.
const NAMES: [&str; 27] = [
    "undefined",
    "float32",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "int32",
    "int64",
    "string",
    "bool",
    "float16",
    "float64",
    "uint32",
    "uint64",
    "complex64",
    "complex128",
    "bfloat16",
    "float8e4m3fn",
    "float8e4m3fnuz",
    "float8e5m2",
    "float8e5m2fnuz",
    "uint4",
    "int4",
    "float4e2m1",
    "float8e8m0",
    "uint2",
    "int2",
];

/// The name of an ONNX element type.
pub(crate) fn dtype_name(number: i32) -> String {
    usize::try_from(number)
        .ok()
        .and_then(|number| NAMES.get(number))
        .map_or_else(|| format!("element type {number}"), |&name| name.to_owned())
}

/// The number of an ONNX element type by its name.
pub(crate) fn number_of(name: &str) -> Option<i32> {
    NAMES.iter().position(|&known| known == name).and_then(|at| i32::try_from(at).ok())
}

/// The number of an element type of the graph in ONNX.
pub(crate) fn onnx_number(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 1,
        DType::U8 => 2,
        DType::I8 => 3,
        DType::I32 => 6,
        DType::I64 => 7,
        DType::Bool => 9,
        DType::F16 => 10,
        DType::BF16 => 16,
        DType::F8E4M3 => 17,
        DType::F8E5M2 => 19,
        DType::U4 => 21,
        DType::I4 => 22,
    }
}

/// The ONNX name of an element type of the graph.
pub(crate) fn onnx_name(dtype: DType) -> String {
    dtype_name(onnx_number(dtype))
}

const UINT16: i32 = 4;
const INT16: i32 = 5;
const DOUBLE: i32 = 11;
const UINT32: i32 = 12;
const UINT64: i32 = 13;

/// The element type that stands for an ONNX one. Integers that the graph has no type for are carried in wider ones (of
/// uint64 the bits), float64 in float32.
pub(crate) fn dtype(number: i32) -> Result<DType, Obstacle> {
    Ok(match number {
        1 | DOUBLE => DType::F32,
        2 => DType::U8,
        3 => DType::I8,
        6 | UINT16 | INT16 => DType::I32,
        7 | UINT32 | UINT64 => DType::I64,
        9 => DType::Bool,
        10 => DType::F16,
        16 => DType::BF16,
        17 => DType::F8E4M3,
        19 => DType::F8E5M2,
        21 => DType::U4,
        22 => DType::I4,
        0 => return Err(Obstacle::invalid("the element type is undefined")),
        8 | 14 | 15 | 18 | 20 | 23..=26 => {
            return Err(Obstacle::unsupported(format!("element type {}", dtype_name(number))));
        }
        _ => return Err(Obstacle::invalid(format!("there is no element type {number}"))),
    })
}

/// Whether an ONNX element type is carried in another one.
pub(crate) fn is_carried(number: i32) -> bool {
    matches!(number, UINT16 | INT16 | DOUBLE | UINT32 | UINT64)
}

/// The range of a carried integer type, as its lowest value and how many it has; none if no value is outside of it.
pub(crate) fn range(number: i32) -> Option<(i64, i64)> {
    match number {
        UINT16 => Some((0, 1 << 16)),
        INT16 => Some((-(1 << 15), 1 << 16)),
        UINT32 => Some((0, 1 << 32)),
        _ => None,
    }
}

/// Bytes of so many elements in a file.
fn stored_bytes(number: i32, dtype: DType, elements: usize) -> Option<usize> {
    match (number, dtype) {
        (UINT16 | INT16, _) => elements.checked_mul(2),
        (UINT32, _) => elements.checked_mul(4),
        (DOUBLE, _) => elements.checked_mul(8),
        (_, DType::I4 | DType::U4) => Some(elements.div_ceil(2)),
        _ => elements.checked_mul(dtype.size()),
    }
}

/// Two elements of each byte, the lower half first.
fn unpacked(bytes: &[u8], dtype: DType, elements: usize) -> Vec<u8> {
    let halves = bytes.iter().flat_map(|byte| [byte & 15, byte >> 4]).take(elements);
    match dtype {
        // The sign of 4 bits becomes that of 8.
        DType::I4 => halves.map(|half| (half ^ 8).wrapping_sub(8)).collect(),
        _ => halves.collect(),
    }
}

/// The value of a tensor, whose bytes are moved where possible.
pub(crate) fn decode(mut proto: TensorProto, external: External) -> Result<Tensor, Obstacle> {
    let dtype = dtype(proto.data_type)?;
    let mut shape = Vec::with_capacity(proto.dims.len());
    for &dim in &proto.dims {
        shape.push(
            usize::try_from(dim).map_err(|_| Obstacle::invalid(format!("a dimension of {dim}")))?,
        );
    }
    if proto.segment.is_some() {
        return Err(Obstacle::unsupported("a tensor in segments"));
    }
    let elements = shape
        .iter()
        .try_fold(1_usize, |count, &dim| count.checked_mul(dim))
        .ok_or_else(|| Obstacle::invalid(format!("dimensions {shape:?} overflow")))?;
    let wanted = stored_bytes(proto.data_type, dtype, elements)
        .ok_or_else(|| Obstacle::invalid(format!("dimensions {shape:?} overflow")))?;
    if proto.data_location.enum_value() == Ok(DataLocation::EXTERNAL) {
        proto.raw_data = read_external(&proto, wanted, external)?;
    }
    let bytes = if !proto.raw_data.is_empty() || elements == 0 {
        std::mem::take(&mut proto.raw_data)
    } else {
        typed_bytes(&proto, dtype)?
    };
    if bytes.len() != wanted {
        return Err(Obstacle::invalid(format!(
            "{} bytes of data for {}{shape:?}, which has {wanted}",
            bytes.len(),
            dtype_name(proto.data_type)
        )));
    }
    let bytes = match (proto.data_type, dtype) {
        (DOUBLE, _) => narrowed(&bytes),
        (UINT16, _) => widened(&bytes, |word| i32::from(u16::from_le_bytes(word)).to_le_bytes()),
        (INT16, _) => widened(&bytes, |word| i32::from(i16::from_le_bytes(word)).to_le_bytes()),
        (UINT32, _) => widened(&bytes, |word| i64::from(u32::from_le_bytes(word)).to_le_bytes()),
        (_, DType::I4 | DType::U4) => unpacked(&bytes, dtype, elements),
        (_, DType::Bool) => bytes.into_iter().map(|byte| u8::from(byte != 0)).collect(),
        _ => bytes,
    };
    Tensor::from_bytes(dtype, shape, bytes)
        .ok_or_else(|| Obstacle::invalid("the data does not have the length of the shape"))
}

#[allow(clippy::cast_possible_truncation, reason = "float64 is kept as float32, which is reported")]
fn narrowed(bytes: &[u8]) -> Vec<u8> {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().flat_map(|&word| (f64::from_le_bytes(word) as f32).to_le_bytes()).collect()
}

/// Each element made wider.
fn widened<const FROM: usize, const TO: usize>(
    bytes: &[u8],
    widen: impl Fn([u8; FROM]) -> [u8; TO],
) -> Vec<u8> {
    let (words, _) = bytes.as_chunks::<FROM>();
    words.iter().flat_map(|&word| widen(word)).collect()
}

/// Elements that a sparse tensor may have when it is written out.
const SPARSE_LIMIT: usize = 1 << 26;

/// The value of a sparse tensor, written out.
pub(crate) fn decode_sparse(
    proto: SparseTensorProto,
    external: External,
) -> Result<Tensor, Obstacle> {
    let missing = || Obstacle::invalid("a sparse tensor without values or indices");
    let values = decode(proto.values.into_option().ok_or_else(missing)?, external)?;
    let indices = decode(proto.indices.into_option().ok_or_else(missing)?, external)?;
    let shape: Option<Vec<usize>> =
        proto.dims.iter().map(|&dim| usize::try_from(dim).ok()).collect();
    let shape = shape.ok_or_else(|| Obstacle::invalid(format!("dimensions {:?}", proto.dims)))?;
    let elements = shape.iter().try_fold(1_usize, |count, &dim| count.checked_mul(dim));
    let elements = elements.filter(|&count| count <= SPARSE_LIMIT).ok_or_else(|| {
        Obstacle::unsupported(format!("a sparse tensor of {shape:?}, more than {SPARSE_LIMIT}"))
    })?;
    let (count, rank) = (values.elements(), shape.len());
    let by_axis = indices.shape() == [count, rank];
    if indices.dtype() != DType::I64 || !(by_axis || indices.shape() == [count]) {
        return Err(Obstacle::invalid(format!("indices {:?} of {count} values", indices.shape())));
    }
    let size = values.dtype().size();
    let mut bytes = vec![0; elements.saturating_mul(size)];
    let (indices, width) = (indices.to_i64(), if by_axis { rank } else { 1 });
    for (at, value) in values.bytes().chunks_exact(size).enumerate() {
        let index = &indices[at * width..(at + 1) * width];
        let limits = if by_axis { &shape[..] } else { &[elements][..] };
        let mut place = 0;
        for (&index, &limit) in index.iter().zip(limits) {
            let index = usize::try_from(index).ok().filter(|&index| index < limit);
            let index = index.ok_or_else(|| {
                Obstacle::invalid(format!("an index {index:?} outside of {shape:?}"))
            })?;
            place = place * limit + index;
        }
        let place = bytes.get_mut(place * size..(place + 1) * size);
        place.ok_or_else(|| Obstacle::invalid("an index of a scalar"))?.copy_from_slice(value);
    }
    Tensor::from_bytes(values.dtype(), shape, bytes)
        .ok_or_else(|| Obstacle::invalid("the data does not have the length of the shape"))
}

/// Little-endian bytes from the typed fields.
#[allow(clippy::cast_possible_truncation, reason = "small types are stored in wider fields")]
fn typed_bytes(proto: &TensorProto, dtype: DType) -> Result<Vec<u8>, Obstacle> {
    let wide = &proto.int32_data;
    let number = proto.data_type;
    let out_of_range = |value: &dyn std::fmt::Display| {
        Obstacle::invalid(format!("{value} does not fit {}", dtype_name(number)))
    };
    Ok(match number {
        UINT16 | INT16 => {
            let mut bytes = Vec::with_capacity(wide.len() * 2);
            for &value in wide {
                let range = if number == INT16 { -(1 << 15)..1 << 15 } else { 0..1 << 16 };
                if !range.contains(&value) {
                    return Err(out_of_range(&value));
                }
                bytes.extend(&value.to_le_bytes()[..2]);
            }
            bytes
        }
        UINT32 => {
            let mut bytes = Vec::with_capacity(proto.uint64_data.len() * 4);
            for value in &proto.uint64_data {
                let value = u32::try_from(*value).map_err(|_| out_of_range(value))?;
                bytes.extend(value.to_le_bytes());
            }
            bytes
        }
        UINT64 => proto.uint64_data.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DOUBLE => proto.double_data.iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => match dtype {
            DType::F32 => proto.float_data.iter().flat_map(|value| value.to_le_bytes()).collect(),
            DType::I64 => proto.int64_data.iter().flat_map(|value| value.to_le_bytes()).collect(),
            DType::I32 => wide.iter().flat_map(|value| value.to_le_bytes()).collect(),
            DType::F16 | DType::BF16 => {
                let mut bytes = Vec::with_capacity(wide.len() * 2);
                for value in wide {
                    bytes.extend(
                        u16::try_from(*value).map_err(|_| out_of_range(value))?.to_le_bytes(),
                    );
                }
                bytes
            }
            DType::I8 => {
                let mut bytes = Vec::with_capacity(wide.len());
                for value in wide {
                    bytes.extend(
                        i8::try_from(*value).map_err(|_| out_of_range(value))?.to_le_bytes(),
                    );
                }
                bytes
            }
            // Of floats the codes, of 4 bits two in each.
            DType::U8 | DType::F8E4M3 | DType::F8E5M2 | DType::I4 | DType::U4 => {
                let mut bytes = Vec::with_capacity(wide.len());
                for value in wide {
                    bytes.push(u8::try_from(*value).map_err(|_| out_of_range(value))?);
                }
                bytes
            }
            DType::Bool => wide.iter().map(|&value| u8::from(value != 0)).collect(),
        },
    })
}

fn read_external(
    proto: &TensorProto,
    wanted: usize,
    external: External,
) -> Result<Vec<u8>, Obstacle> {
    let mut location = None;
    let (mut offset, mut length) = (0_u64, None);
    for entry in &proto.external_data {
        let number = || {
            entry.value.parse::<u64>().map_err(|_| {
                Obstacle::invalid(format!("external data: {} is `{}`", entry.key, entry.value))
            })
        };
        match entry.key.as_str() {
            "location" => location = Some(entry.value.as_str()),
            "offset" => offset = number()?,
            "length" => length = Some(number()?),
            "checksum" => {}
            key => return Err(Obstacle::invalid(format!("external data: unknown key `{key}`"))),
        }
    }
    let location = location.ok_or_else(|| Obstacle::invalid("external data without a location"))?;
    let length = length.unwrap_or(wanted as u64);
    if length != wanted as u64 {
        return Err(Obstacle::invalid(format!(
            "external data of {length} bytes for a tensor of {wanted}"
        )));
    }
    external(location, offset, length)
        .map_err(|reason| Obstacle::invalid(format!("external data `{location}`: {reason}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: &str, _: u64, _: u64) -> Result<Vec<u8>, String> {
        Err("there is none".to_owned())
    }

    #[test]
    fn every_typed_field_is_read() {
        let cases: [(i32, TensorProto); 18] = [
            (4, TensorProto { int32_data: vec![1, 2], ..Default::default() }),
            (5, TensorProto { raw_data: vec![1, 0, 2, 0], ..Default::default() }),
            (12, TensorProto { uint64_data: vec![1, 2], ..Default::default() }),
            (12, TensorProto { raw_data: vec![1, 0, 0, 0, 2, 0, 0, 0], ..Default::default() }),
            (13, TensorProto { uint64_data: vec![1, 2], ..Default::default() }),
            (1, TensorProto { float_data: vec![1.0, 2.0], ..Default::default() }),
            (11, TensorProto { double_data: vec![1.0, 2.0], ..Default::default() }),
            (7, TensorProto { int64_data: vec![1, 2], ..Default::default() }),
            (6, TensorProto { int32_data: vec![1, 2], ..Default::default() }),
            (3, TensorProto { int32_data: vec![1, 2], ..Default::default() }),
            (10, TensorProto { int32_data: vec![0x3c00, 0x4000], ..Default::default() }),
            (16, TensorProto { raw_data: vec![0x80, 0x3f, 0x00, 0x40], ..Default::default() }),
            (17, TensorProto { raw_data: vec![0x38, 0x40], ..Default::default() }),
            (17, TensorProto { int32_data: vec![0x38, 0x40], ..Default::default() }),
            (19, TensorProto { raw_data: vec![0x3c, 0x40], ..Default::default() }),
            (21, TensorProto { raw_data: vec![0x21], ..Default::default() }),
            (22, TensorProto { raw_data: vec![0x21], ..Default::default() }),
            (22, TensorProto { int32_data: vec![0x21], ..Default::default() }),
        ];
        for (data_type, proto) in cases {
            let proto = TensorProto { data_type, dims: vec![2], ..proto };
            let tensor = decode(proto, &none).expect("well-formed");
            assert_eq!(tensor.to_f64(), [1.0, 2.0], "{}", dtype_name(data_type));
        }
    }

    #[test]
    fn the_lower_half_of_a_byte_comes_first() {
        for (data_type, wanted) in [(21, [15.0, 7.0, 8.0]), (22, [-1.0, 7.0, -8.0])] {
            let raw_data = vec![0x7f, 0x08];
            let proto = TensorProto { data_type, dims: vec![3], raw_data, ..Default::default() };
            assert_eq!(decode(proto, &none).expect("well-formed").to_f64(), wanted);
        }
    }

    #[test]
    fn sparse_tensors_are_written_out() {
        let sparse = |dims: Vec<i64>, indices: Vec<i64>, shape: Vec<i64>| {
            let count = shape[0];
            let float_data = (1..=count).map(|value| value as f32).collect();
            let values =
                TensorProto { data_type: 1, dims: vec![count], float_data, ..Default::default() };
            let indices = TensorProto {
                data_type: 7,
                dims: shape,
                int64_data: indices,
                ..Default::default()
            };
            let proto = SparseTensorProto {
                dims,
                values: Some(values).into(),
                indices: Some(indices).into(),
                ..Default::default()
            };
            decode_sparse(proto, &none)
        };
        let wanted = [0.0, 1.0, 0.0, 0.0, 0.0, 2.0];
        for (indices, shape) in [(vec![1, 5], vec![2]), (vec![0, 1, 1, 2], vec![2, 2])] {
            assert_eq!(sparse(vec![2, 3], indices, shape).expect("sound").to_f64(), wanted);
        }
        for (dims, indices, shape) in [
            (vec![2, 3], vec![1, 6], vec![2]),
            (vec![2, 3], vec![1, -1], vec![2]),
            (vec![1 << 40, 3], vec![1, 2], vec![2]),
            (vec![-2, 3], vec![1, 2], vec![2]),
            (vec![2, 3], vec![0, 1, 2, 2], vec![2, 2]),
            (vec![], vec![3], vec![1]),
        ] {
            assert!(sparse(dims.clone(), indices, shape).is_err(), "{dims:?}");
        }
    }

    #[test]
    fn data_of_another_length_is_refused() {
        for dims in [vec![3], vec![-1], vec![1 << 62, 1 << 62]] {
            let proto =
                TensorProto { data_type: 1, dims, float_data: vec![0.0; 2], ..Default::default() };
            assert!(matches!(decode(proto, &none), Err(Obstacle::Invalid(_))));
        }
    }
}
