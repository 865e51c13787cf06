#!/usr/bin/env bash
# Builds both libraries, checks the CUDA library and measures it, on any machine with an NVIDIA GPU, nvcc, g++ and Bun.
# usage: test/gpu/run.sh [stage ...]    stages: header kernels models accuracy memcheck racecheck copies operations
# attention skinny prompts engine timeline peers (default: header kernels models copies operations attention skinny
# prompts; prompts on Hopper alone). BUN names the Bun to use. Logs go to $OUT (default: a new folder under the system's
# temporary one). engine measures whole steps and turns, timeline the kernels of steps, of models of the shapes in
# ENGINE_SHAPES (default 8b; 16 GB; 8b:fp8 quantised), beside the floor of a copy on the device at COPY_TBS (default
# 3.0, an H100's) TB/s.
# kernels runs the products again with KVASIR_CUDA_FP8_SCALES=after, FP8 as on GPUs whose products take no scale for each
# row and output (any but compute capability 9.0), and with KVASIR_CUDA_HOPPER=off, products as on GPUs but Hopper.
# accuracy and peers need python3 with torch and transformers: the former writes checkpoints of REFERENCE_SHAPES (default
# 1b; 3 GB) and compares logits, the latter times that stack with PEER_SHAPES (default 8b).
set -uo pipefail
cd "$(dirname "$0")/../.."

stages=("$@")
[ "${#stages[@]}" -gt 0 ] || stages=(header kernels models copies operations attention skinny prompts)
out=${OUT:-$(mktemp -d)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

bun=${BUN:-}
for candidate in node_modules/.bin/bun "$(command -v bun || true)"; do
  if [ -z "$bun" ] && [ -n "$candidate" ] && [ -x "$candidate" ]; then bun=$candidate; fi
done
[ -n "$bun" ] || { echo "there is no Bun: npm ci, or name one in BUN"; exit 2; }

# cuBLASLt may come with Python packages alone.
find_file() { find / -name "$1" -not -path '/proc/*' 2>/dev/null | sort | head -n 1; }
if [ -z "${KVASIR_CUBLASLT:-}" ] && ! ldconfig -p | grep -q libcublasLt && [ ! -e /usr/local/cuda/lib64/libcublasLt.so ]; then
  KVASIR_CUBLASLT=$(find_file 'libcublasLt.so.1[23]')
  export KVASIR_CUBLASLT
fi

libraries=$("$bun" test/gpu/build.ts) || exit 1
cpu=$(sed -n 's/^cpu=//p' <<<"$libraries")
cuda=$(sed -n 's/^cuda=//p' <<<"$libraries")
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
[ "$capability" = 90 ] && capability=90a
gencode="-gencode=arch=compute_$capability,code=sm_$capability"
native=sidecar/native

stage() { printf '\n== %s\n' "$1"; }
count() { if [ "$1" -ne 0 ]; then failures=$((failures + 1)); echo "FAILED: $2"; fi; }

compile_kernel_check() {
  g++ -std=c++20 -O2 -o "$work/kernel-check" test/gpu/kernel-check.cpp test/gpu/check-*.cpp -ldl -pthread
}

compile_skinny() {
  nvcc -std=c++20 -O3 $gencode -o "$work/skinny" test/gpu/skinny-bench.cu $native/cuda/skinny-*.cu \
    $native/cuda/stream-k.sm90a.cu $native/cuda/tensor-map.cpp
}

compile_prompts() {
  nvcc -std=c++20 -O3 $gencode -o "$work/prompts" test/gpu/prompt-bench.cu $native/cuda/prompt-matmul.sm90a.cu \
    $native/cuda/{tensor-map,library-matmul,cublaslt-api,device-memory,plan-file}.cpp $native/common/failure.cpp -ldl
}

{
  date -u +%F
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  for name in "${stages[@]}"; do
    stage "$name"
    case $name in
      header)
        header=$(find_file cublasLt.h)
        if [ -z "$header" ]; then
          echo "no cublasLt.h here to compare with"
        else
          nvcc -std=c++20 -I"$(dirname "$header")" -o "$work/header" test/gpu/cublaslt-header-check.cu && "$work/header"
          count $? "the header of cuBLASLt"
        fi
        ;;
      kernels)
        compile_kernel_check && "$work/kernel-check" "$cpu" "$cuda"
        count $? "kernels"
        echo "-- FP8 with scales after the product"
        KVASIR_CUDA_FP8_SCALES=after "$work/kernel-check" "$cpu" "$cuda" matmul
        count $? "kernels with FP8 scales after the product"
        echo "-- products as on GPUs other than Hopper"
        KVASIR_CUDA_HOPPER=off "$work/kernel-check" "$cpu" "$cuda" matmul chains
        count $? "kernels without those of Hopper"
        ;;
      memcheck)
        compile_kernel_check &&
          compute-sanitizer --error-exitcode 3 "$work/kernel-check" "$cpu" "$cuda" --small --seed 1
        count $? "memcheck"
        ;;
      racecheck)
        compile_kernel_check
        racecheck() {
          echo "-- $1"
          timeout "${RACECHECK_SECONDS:-600}" compute-sanitizer --tool racecheck --error-exitcode 3 "${@:2}"
          count $? "racecheck of $1"
        }
        for group in rows chains attention sampling; do
          racecheck "$group" "$work/kernel-check" "$cpu" "$cuda" --small --seed 1 "$group"
        done
        # Our own products alone: on the library's the sanitizer gives up.
        compile_skinny
        racecheck products "$work/skinny" 1 check-small
        if [ "$capability" = 90a ]; then
          compile_prompts && racecheck "products of prompts" "$work/prompts" 1 check-small
        fi
        ;;
      models)
        "$bun" test/gpu/model-check.ts "$cuda"
        count $? "models"
        ;;
      accuracy)
        directories=()
        for shape in ${REFERENCE_SHAPES:-1b}; do
          python3 test/gpu/reference-logits.py "$shape" "$work/$shape" && directories+=("$work/$shape")
          count $? "the reference of $shape"
        done
        "$bun" test/gpu/accuracy-check.ts "$cuda" "${directories[@]}"
        count $? "accuracy"
        ;;
      copies)
        nvcc -std=c++20 -O2 $gencode -o "$work/copies" test/gpu/copy-bench.cu $native/cuda/layer-copy.cu \
          $native/common/failure.cpp && "$work/copies"
        count $? "copies"
        ;;
      operations)
        g++ -std=c++20 -O2 -o "$work/operations" test/gpu/ops-bench.cpp -ldl -pthread && "$work/operations" "$cuda"
        count $? "operations"
        ;;
      attention)
        nvcc -std=c++20 -O3 $gencode -o "$work/attention" test/gpu/attention-bench.cu $native/cuda/attention-*.cu \
          $native/cuda/tensor-map.cpp &&
          "$work/attention"
        count $? "attention"
        ;;
      skinny)
        compile_skinny && "$work/skinny"
        count $? "skinny"
        ;;
      prompts)
        if [ "$capability" != 90a ]; then
          echo "no products of prompts here: these are Hopper's"
        else
          compile_prompts && "$work/prompts"
          count $? "prompts"
        fi
        ;;
      engine)
        "$bun" test/gpu/engine/main.ts "$cuda" --shapes "${ENGINE_SHAPES:-8b}" --copy-tbs "${COPY_TBS:-3.0}" \
          --json "$out/engine.json" --trace sidecar/simulate/traces/sharegpt.tsv.gz
        count $? "engine"
        ;;
      timeline)
        header=$(find_file cupti_activity.h)
        crt=$(find / -path '*/crt/host_defines.h' -not -path '/proc/*' 2>/dev/null | sort | head -n 1)
        record=$(grep -ho 'CUpti_ActivityKernel[0-9]*' "$header" | sort -Vu | tail -n 1)
        g++ -std=c++20 -O2 -shared -fPIC -DKERNEL_RECORD="$record" -I"$(dirname "$header")" \
          -I"$(dirname "$(dirname "$crt")")" -o "$work/kernel-trace.so" test/gpu/kernel-trace.cpp &&
          LD_PRELOAD=$(find_file 'libcupti.so.1[23]') CUDA_INJECTION64_PATH=$work/kernel-trace.so \
            KERNEL_TRACE=$out/kernels.txt "$bun" test/gpu/engine/main.ts "$cuda" --shapes "${ENGINE_SHAPES:-8b}" \
            --parts prefill,decode --copy-tbs "${COPY_TBS:-3.0}" &&
          python3 test/gpu/kernel-trace.py "$out/kernels.txt" decode1 decode16 decode64 prefill2048
        count $? "timeline"
        ;;
      peers)
        python3 test/gpu/peers.py && python3 test/gpu/peer-models.py --shapes "${PEER_SHAPES:-8b}" \
          --trace sidecar/simulate/traces/sharegpt.tsv.gz
        count $? "peers"
        ;;
      *)
        echo "no stage $name"
        failures=$((failures + 1))
        ;;
    esac
  done
  printf '\n%d stages failed\n' "$failures"
  exit "$failures"
} | tee "$out/run.log"
exit "${PIPESTATUS[0]}"
