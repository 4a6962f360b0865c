#!/usr/bin/env bash
# The paper's experiment: Baseline, Block Cache, TeaCache, H2-Cache and the others on 80 prompts, as one table.
#
#   bash run_exper.sh                                      # the embedded model, each method at its measured preset
#   bash run_exper.sh --quick                              # 12 prompts
#   bash run_exper.sh --curves                             # every method at six thresholds or more (long)
#   bash run_exper.sh --model black-forest-labs/FLUX.1-dev --steps 100      # the paper's set-up; needs GPU and weights
#
# Everything else is passed on to `python -m analysis.experiment` (see its --help). With several GPUs the prompts are
# divided. A run that was stopped goes on where it ended. Results: outputs/experiment, or --out DIR.
set -euo pipefail
checkout=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# The user's folder stays the one that paths begin at, and nothing in it is taken for ours.
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

arguments=()
for argument in "$@"; do
    case "$argument" in
        --quick) arguments+=(--limit 12) ;;
        --curves)
            arguments+=(--methods
                block_cache:threshold=0.03,0.05,0.075,0.1,0.15,0.2,0.25,0.3,0.4
                teacache:threshold=0.03,0.05,0.075,0.1,0.125,0.15,0.2,0.25
                fewer_steps:factor=1.5,2,2.5,3,4,5,6
                h2cache:tau1=0.06,0.08,0.12:tau2=0.02 h2cache:tau1=0.15:tau2=0.03 h2cache:tau1=0.2:tau2=0.05
                h2cache:tau1=0.25:tau2=0.1 h2cache:tau1=0.35,0.5:tau2=0.2 h2cache:tau1=0.5:tau2=0.3) ;;
        *) arguments+=("$argument") ;;
    esac
done

python=$(command -v python || command -v python3 || true)
if [ -z "$python" ]; then
    echo "error: neither python nor python3 is on the PATH" >&2
    exit 2
fi
trap 'echo "stopped: nothing has begun" >&2; exit 130' INT
gpus=$("$python" -c '
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    import torch
except ImportError as error:
    sys.exit(f"error: {error}: pip install -r requirements.txt")
a = torch.accelerator
print(a.device_count() if a.is_available() else 0)') || exit 2
trap - INT
# ${x[@]+"${x[@]}"}: bash before 4.4 (macOS) calls an empty array unbound.
if [ "$gpus" -gt 1 ]; then
    arguments=(--processes "$gpus" ${arguments[@]+"${arguments[@]}"})  # one that is given counts
fi
exec "$python" -m analysis.experiment ${arguments[@]+"${arguments[@]}"}
