say() { printf '[megatron-cp] %s\n' "$*"; }
stop() {
    say "$*" >&2
    exit 1
}

# Preemption sends TERM to this shell too; whether to requeue is decided after the ranks have saved.
trap : TERM USR2

if [ "${SLURM_JOB_NUM_NODES:-0}" != "$nodes" ]; then
    stop "the recipe runs on $nodes nodes and this job has ${SLURM_JOB_NUM_NODES:-none}; submit it with --nodes $nodes"
fi
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
say "job $SLURM_JOB_ID trains $recipe on ${#hosts[@]} nodes: ${hosts[*]}"
say "submitted with $about; started $(date '+%F %T %Z')"
# NodeAddr is how SLURM itself reaches the node; its name need not resolve
facts=$(scontrol --oneliner show node "${hosts[0]}")
[[ $facts =~ [[:space:]]NodeAddr=([^[:space:]]+) ]] || stop "scontrol does not tell the address of ${hosts[0]}"
export MASTER_ADDR=${BASH_REMATCH[1]}
# jobs that share a node get different ports, below those that Linux gives to connections
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))

one_task=(srun --nodes=1 --ntasks=1 --ntasks-per-node=1)
one_task_per_node=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1)
python_there=("${step[@]}" "${wrapper[@]}" "${settings[@]}" "$python")

if [ "$preflight" = true ]; then
    reports=$save/preflight-$SLURM_JOB_ID
    rm -rf -- "$reports"
    mkdir -p -- "$reports"
    say "checks ${hosts[*]}"
    # a node that fails, or does not answer in a quarter of an hour, is named by the second step
    "${one_task_per_node[@]}" --time=15 "${python_there[@]}" -m megatron_cp doctor --node \
        --report "$reports" --master-addr "$MASTER_ADDR" "${check[@]}" >/dev/null || true
    "${one_task[@]}" "${python_there[@]}" -m megatron_cp doctor --reports "$reports" "${hosts[@]}" ||
        stop "training was not started; what the nodes report is in $reports"
    rm -r -- "$reports"
fi

if [ -n "$corpus_index" ] && [ ! -f "$corpus_index" ]; then
    "${one_task[@]}" "${python_there[@]}" "${corpus[@]}"
fi

# what the trainer leaves when it has saved because it was told to stop
marker=$save/unfinished-$SLURM_JOB_ID.json
rm -f -- "$marker"
status=0
if [ "$launcher" = srun ]; then
    # one task for each rank, which takes its number from SLURM
    srun --nodes="$nodes" --ntasks=$((nodes * ranks_per_node)) --ntasks-per-node="$ranks_per_node" \
        --kill-on-bad-exit=1 "${python_there[@]}" "${train[@]}" || status=$?
else
    # one torchrun for each node; only the task knows the number of its node. torchrun passes TERM on to its ranks and
    # would die of USR2
    # shellcheck disable=SC2016
    task='
        export PET_NODE_RANK=$SLURM_NODEID PET_MASTER_ADDR=$MASTER_ADDR PET_MASTER_PORT=$MASTER_PORT
        trap "" USR2
        (exec "$@") &
        torchrun=$! status=0
        trap "kill -TERM $torchrun" USR2
        trap : TERM
        wait "$torchrun" || status=$?
        while kill -0 "$torchrun" 2>/dev/null; do
            status=0
            wait "$torchrun" || status=$?
        done
        exit "$status"
    '
    "${one_task_per_node[@]}" --kill-on-bad-exit=1 "${step[@]}" "${wrapper[@]}" \
        sh -c "$task" sh "${settings[@]}" "$python" "${train[@]}" || status=$?
fi

# torchrun exits 1 after SIGTERM whether or not the ranks saved, so its status decides nothing
if [ ! -f "$marker" ]; then
    exit "$status"
fi
rm -f -- "$marker"
restarts=${SLURM_RESTART_COUNT:-0}
# the last task of an array has the number of the whole array
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
# a job that is being cancelled is not running any more, and stays cancelled
state=$(squeue --noheader --jobs="$job" --format=%T)
if [ "$requeues" -eq 0 ] || [ "$state" != RUNNING ]; then
    say "stopped before the last iteration, with everything saved in $save"
    exit 0
fi
if [ "$restarts" -ge "$requeues" ]; then
    stop "saved in $save; requeued $restarts times, which is the limit: submit it again, or raise --requeues"
fi
say "saved in $save; requeues job $job, $((restarts + 1)) of at most $requeues times"
scontrol requeue "$job"
