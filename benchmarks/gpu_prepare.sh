#!/usr/bin/env bash
# Pack what benchmarks/gpu.py needs on a machine without a network: images and wheels, at most 64 MiB in all.
#
#   benchmarks/gpu_prepare.sh DATA [PYTHON_VERSION]      # DATA: train/CLASS/* and val/CLASS/*, JPEG files
#
# Writes .gpu/data.tar and .gpu/wheels/; torch, torchvision, numba, opencv, pyarrow and matplotlib, which are larger, are
# expected there. If the images exceed 57 MiB, an equal share of each class is kept. There:
#
#   python -m pip install --no-index --no-deps --target /tmp/site .gpu/wheels/*.whl
#   mkdir -p /tmp/data && tar xf .gpu/data.tar -C /tmp/data
#   PYTHONPATH=/tmp/site:src python benchmarks/gpu.py measure --minutes 8 --json gpu.json
#   PYTHONPATH=/tmp/site:src python benchmarks/gpu.py train /tmp/data --minutes 9 --json gpu-train.json
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?expected the folder of a dataset with train/ and val/} python=${2:-3.12}
[ -d "$data/train" ] && [ -d "$data/val" ] || { echo "expected $data/train and $data/val" >&2; exit 2; }
rm -rf .gpu && mkdir -p .gpu/wheels
count=$(find "$data/train" "$data/val" -type f | wc -l)
bytes=$(($(du -sbL "$data" | cut -f1) + 1024 * count)) limit=$((57 * 1024 * 1024))
# A hash of the name chooses the images, so that the choice is the same everywhere and equal over classes.
keep=$((bytes <= limit ? 1000 : 1000 * limit / bytes))
(cd "$data" && find train val -type f | LC_ALL=C sort | python3 -c '
import sys, zlib
for line in sys.stdin:
    if zlib.crc32(line.strip().encode()) % 1000 < int(sys.argv[1]):
        print(line.strip())' "$keep") > .gpu/files.txt
tar cf .gpu/data.tar --dereference -C "$data" -T .gpu/files.txt
platforms=(); for glibc in 28 27 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
  "${platforms[@]}" --platform manylinux2014_x86_64 -d .gpu/wheels \
  timm simplejpeg tyro typeguard docstring-parser tensorboardx rich safetensors lightly lightly-utils aenum
du -sh .gpu | cut -f1
[ "$(du -sb .gpu | cut -f1)" -le $((64 * 1024 * 1024)) ] || { echo ".gpu is larger than 64 MiB: pass fewer images" >&2; exit 1; }
