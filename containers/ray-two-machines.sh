#!/bin/bash
# Kimi-K2.6 on two machines of 8 × H100 in vLLM, over a Ray cluster; the commands are those of
#     k26 plan --engine vllm --gpus 16xH100 --context 65536 --checkpoint /model
# In each machine's environment or container, where /model is the published checkpoint:
#     ray-two-machines.sh first                on the first machine
#     ray-two-machines.sh other ADDRESS        on the other, with the first one's address
# A machine that `k26 doctor` finds something bad on does not join.
set -euo pipefail
machines=2
alive='import ray; ray.init("auto", log_to_driver=False); print(sum(node["Alive"] for node in ray.nodes()))'

case ${1:-} in
  first)
    k26 doctor --checkpoint /model --engine vllm
    ray start --head --port 6379
    until [ "$(python3 -c "$alive" 2>/dev/null)" = "$machines" ]; do
      echo "waiting for $machines machines"
      sleep 5
    done
    exec vllm serve /model --tensor-parallel-size 8 --pipeline-parallel-size 2 --mm-encoder-tp-mode data \
      --max-model-len 65536 --gpu-memory-utilization 0.90 --max-num-batched-tokens 8192 --max-num-seqs 256 \
      --distributed-executor-backend ray --host 0.0.0.0 --port 8000
    ;;
  other)
    address=${2:?the address of the first machine}
    k26 doctor --checkpoint /model --engine vllm
    exec ray start --address "$address:6379" --block
    ;;
  *)
    echo "usage: $0 first | other ADDRESS" >&2
    exit 2
    ;;
esac
