#!/usr/bin/env bash
# All that needs a machine with a GPU, in one pass (an hour by estimate; not run yet) or in parts:
#   tests/gpu.sh [CAMVID [OUT]] | tee gpu.txt
#   PARTS="tests speed" tests/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
camvid=${1:-data/CamVid}
out=${2:-runs/gpu}
parts=" ${PARTS:-tests speed compiled loader camvid} "
failed=0

speed() {  # of the papers' networks and batches
    flags="--steps 30 --workers 8 $*"
    python tests/bench.py --script cct.py --images 20 --size 320 $flags || failed=1
    python tests/bench.py --script three_stage.py --images 10 --size 321 --backbone resnet101 $flags || failed=1
    python tests/bench.py --script c3_semiseg.py --images 32 --size 512 --crop 256x512 --groups 4 --backbone resnet101 $flags || failed=1
    python tests/bench.py --script s4gan_mlmt.py --images 16 --size 321 --backbone resnet101 $flags || failed=1
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python -c "import torch, torchvision; print('torch', torch.__version__, 'torchvision', torchvision.__version__)"

if [[ $parts == *" tests "* ]]; then
    python -m pytest -q tests/test_cuda.py || failed=1
fi

if [[ $parts == *" speed "* ]]; then
    speed --precision bf16
    speed --precision fp32
    python tests/bench.py --decoders --precision bf16 || failed=1
fi

if [[ $parts == *" compiled "* ]]; then
    speed --precision bf16 --compile
fi

if [[ $parts == *" loader "* ]]; then
    python tests/bench.py --loader || failed=1
fi

if [[ $parts == *" camvid "* ]]; then  # from scratch, at the papers' 360x480
    for script in cct three_stage c3_semiseg s4gan_mlmt; do
        for kind in "" "--supervised"; do
            flags="--data camvid --root $camvid --labeled 100 --weights none --backbone resnet50 --workers 8 --steps 500 --eval-every 250"
            timeout -k 60 200 python $script.py $flags $kind --out "$out/$script$kind" | tail -n 14 || failed=1
        done
    done
    python -m common.summary "$out"/* --panel --out "$out.png" || failed=1
fi
exit $failed
