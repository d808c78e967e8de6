#!/usr/bin/env bash
# Trains on several nodes under SLURM, and goes on by itself after a pre-emption or the time limit:
#
#     sbatch --nodes=4 examples/slurm.sh dc_f32c32_eqm /data/imagenet runs/f32c32
#     sbatch --nodes=4 examples/slurm.sh dc_f32c32_eqm /data/imagenet runs/f32c32 --recipe three_phase
#
#SBATCH --job-name=dc-ssdae
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Three minutes before the end, every process of the job gets SIGTERM: the trainer finishes its step, saves, and exits
# with 0. The launcher gives it 30 seconds for that.
#SBATCH --signal=TERM@180
set -euo pipefail

CONFIG=${1:?which preset or YAML file?}
DATA=${2:?where is the data?}
RUN=${3:?which folder for the run?}
shift 3

HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}

# The run's folder appears whole, by one rename: where it is, there is something to go on with.
if [ -e "$RUN/config.yaml" ] || [ -e "$RUN/recipe.yaml" ]; then
    WORDS=(--resume "$RUN")
    while [ $# -gt 0 ]; do # what goes on knows its recipe
        if [ "$1" = --recipe ]; then shift 2; else WORDS+=("$1") && shift; fi
    done
else
    WORDS=(--config "$CONFIG" --data.root "$DATA" --training.output "$RUN" "$@")
fi

# Prints how many steps the last checkpoint has behind it, and how many the run is to have; of a recipe, over its phases.
steps() {
    python - "$RUN" <<'PYTHON'
import json, pathlib, sys, yaml
run = pathlib.Path(sys.argv[1])
config, recipe = run / "config.yaml", run / "recipe.yaml"
if recipe.is_file():
    phases = list(yaml.safe_load(recipe.read_text())["phases"].items())
    runs = [(run / f"{place}-{name}", phase) for place, (name, phase) in enumerate(phases, 1)]
else:
    runs = [(run, yaml.safe_load(config.read_text()))] if config.is_file() else []
states = [folder / "checkpoints" / "last" / "state.json" for folder, _ in runs]
done = sum(json.loads(state.read_text())["step"] for state in states if state.is_file())
print(done, sum(settings["training"]["steps"] for _, settings in runs))
PYTHON
}
read -r BEFORE _ <<<"$(steps)"

srun --kill-on-bad-exit=0 bash -c '
    exec accelerate launch \
        --multi_gpu \
        --num_machines "$SLURM_NNODES" \
        --num_processes "$((SLURM_NNODES * '"$GPUS_PER_NODE"'))" \
        --machine_rank "$SLURM_NODEID" \
        --main_process_ip "'"$HEAD_NODE"'" \
        --main_process_port "${MASTER_PORT:-29500}" \
        --mixed_precision no \
        --dynamo_backend no \
        -m dc_ssdae train "$@"
' dc-ssdae "${WORDS[@]}" --training.processes "$((SLURM_NNODES * GPUS_PER_NODE))" || true

# After the time limit the job itself has to ask for another turn; after a pre-emption SLURM does. A job that got no
# further than it was has another trouble than time.
read -r AFTER WANTED <<<"$(steps)"
echo "step $AFTER of $WANTED"
if [ "$AFTER" -gt "$BEFORE" ] && [ "$AFTER" -lt "$WANTED" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
