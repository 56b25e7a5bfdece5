//! How the command refuses: with a code, a place and what to do, and nothing written.

use crate::command::{MLP, Place, digits};
use crate::support::{root, snapshot};
use qcompile::data::Array;

/// Writes the files that bad commands are given.
fn bad_files(place: &Place) {
    let model = std::fs::read(root().join("models/digits_mlp.onnx")).expect("well-formed");
    place.write("empty.onnx", b"");
    place.write("half.onnx", &model[..model.len() / 2]);
    place.write("junk.onnx", vec![0xa5; 4096]);
    place.write("nested.onnx", [0x3a, 0x80].repeat(5 << 20));
    place.write(
        "text.qir",
        "graph @g {\n  input %x : f32[N, 2]\nforward:\n  %y : f32[N] = relu %x\n}\n",
    );
    place.run(&format!("{MLP} --precision f32"));
    let plan = place.bytes("mlp.qplan");
    let mut flipped = plan.clone();
    flipped[plan.len() / 2] ^= 1;
    place.write("flipped.qplan", flipped);
    place.write("short.qplan", &plan[..plan.len() - 64]);
    std::fs::create_dir(place.path("folder")).expect("well-formed");
    let [x, label] = digits(4);
    let changed = |value: f32| {
        let mut values = x.1.to_f32().expect("well-formed");
        values[70] = value;
        ("x", Array::from_f32(vec![4, 64], &values).expect("well-formed"))
    };
    place.write_npz("good.npz", &[x.clone(), label.clone()]);
    place.write_npz("nan.npz", &[changed(f32::NAN), label.clone()]);
    place.write_npz("missing.npz", &[("X", x.1.clone()), label.clone()]);
    place.write_npz(
        "labels.npz",
        &[x.clone(), ("label", Array::from_i64(vec![4], &[0, 1, 10, 2]).expect("well-formed"))],
    );
    place.write_npz(
        "wide.npz",
        &[("x", Array::from_f32(vec![4, 65], &[0.0; 260]).expect("well-formed")), label.clone()],
    );
    place.write_npz(
        "double.npz",
        &[("x", Array::from_f64(vec![4, 64], &[0.0; 256]).expect("well-formed")), label.clone()],
    );
    place.write_npz("none.npz", &[("x", Array::from_f32(vec![0, 64], &[]).expect("well-formed"))]);
    place.write("half.npz", &place.bytes("good.npz")[..500]);
}

#[test]
fn bad_input_is_refused_with_code_place_and_help() {
    let place = Place::new();
    bad_files(&place);
    let before = place.names();
    let run = "run @/digits_mlp.onnx --outputs o.npz --inputs";
    let gradients = "run @/digits_mlp.onnx --loss cross-entropy --gradients o.npz --inputs";
    let train = "train mlp.qplan -q --data";
    let cases = [
        (2, String::new()),
        (2, "@/digits_mlp.onnx --flag".to_owned()),
        (2, "@/digits_mlp.onnx --precision int4".to_owned()),
        (2, "run @/digits_mlp.onnx".to_owned()),
        (2, "trian mlp.qplan".to_owned()),
        (74, "none.onnx".to_owned()),
        (3, "empty.onnx".to_owned()),
        (3, "half.onnx".to_owned()),
        (3, "junk.onnx".to_owned()),
        (5, "nested.onnx".to_owned()),
        (3, "text.qir".to_owned()),
        (3, "folder".to_owned()),
        (3, "mlp.qplan".to_owned()),
        (3, "good.npz".to_owned()),
        (2, "@/digits_mlp.onnx --freeze fc9".to_owned()),
        (2, "@/digits_mlp.onnx --keep f32=fc9 --precision int8".to_owned()),
        (2, "@/digits_mlp.onnx --channel-policy split --precision int8".to_owned()),
        (2, "@/digits_mlp.onnx --channel-threshold 1 --precision bf16".to_owned()),
        (
            2,
            "@/digits_mlp.onnx --channel-policy multipoint --channel-threshold 9 --metric activation-range --precision int8".to_owned(),
        ),
        (2, "@/digits_mlp.onnx --loss output".to_owned()),
        (2, "@/digits_mlp.onnx --dim m=3".to_owned()),
        (74, "@/digits_mlp.onnx -o folder".to_owned()),
        (74, "@/digits_mlp.onnx -o none/mlp.qplan".to_owned()),
        (3, "train flipped.qplan --data good.npz".to_owned()),
        (3, "eval short.qplan --data good.npz".to_owned()),
        (3, "bench @/digits_mlp.onnx".to_owned()),
        (3, format!("{run} wide.npz")),
        (3, format!("{run} double.npz")),
        (3, format!("{run} missing.npz")),
        (3, format!("{run} none.npz")),
        (3, format!("{run} half.npz")),
        (74, format!("{run} none")),
        (3, format!("{gradients} nan.npz")),
        (3, format!("{gradients} labels.npz")),
        (3, "run mlp.qplan --loss mse --gradients o.npz --inputs good.npz".to_owned()),
        (3, format!("{train} nan.npz")),
        (3, format!("{train} labels.npz")),
        (3, format!("{train} missing.npz --eval wide.npz")),
        (3, format!("{train} good.npz --eval wide.npz")),
        (2, format!("{train} good.npz:scale=x")),
        (3, format!("{train} good.npz --optimizer adam --freeze fc1*")),
        (2, format!("{train} good.npz --checkpoint folder --resume")),
        (4, format!("{train} good.npz --batch-size 1 --epochs 40 --lr 1e30")),
    ];
    let mut text = String::new();
    for (code, line) in cases {
        let outcome = place.try_run(&line);
        assert_eq!(outcome.code, code, "{line}: {outcome:?}");
        assert!(outcome.stderr.contains("error[QC"), "{line}: {outcome:?}");
        text.push_str(&format!("$ qcompile {line}\n{}exit {code}\n\n", outcome.stderr));
    }
    snapshot("cli", "errors", &text);
    assert_eq!(place.names(), before, "something was written");
}

#[test]
fn no_byte_of_a_plan_can_be_changed() {
    let place = Place::new();
    place.run(&format!("{MLP} --precision f32"));
    let plan = place.bytes("mlp.qplan");
    let stride = plan.len() / 12;
    for at in (5..plan.len()).step_by(stride) {
        let mut flipped = plan.clone();
        flipped[at] ^= 0x20;
        place.write("flipped.qplan", flipped);
        let outcome = place.try_run("inspect flipped.qplan");
        assert_eq!(outcome.code, 3, "byte {at}: {outcome:?}");
    }
}

#[test]
fn files_without_an_end_are_not_read() {
    let outcome = Place::new().try_run("inspect /dev/zero");
    assert_eq!(outcome.code, 74, "{outcome:?}");
}
