# Runs in a container for the lifetime of its sandbox: one request per line on stdin, answered on stdout.
#
# A request is a line MARKER SECONDS KIND SCRIPT_LENGTH STDIN_LENGTH, then a bash script and its stdin of these lengths
# in bytes. MARKER is a random word, SECONDS a time limit, and KIND says whether stdin is text or base64. The answer is
# the script's output, then a line of MARKER, the exit code, and the number of processes that the kernel has killed here
# for lack of memory. When a script ends or its time is over, everything it started is killed: kill -1 reaches every
# process but this shell and the container's main process, which belongs to another user.
kill -9 -1 2>/dev/null # processes of a lost shell
stdin() { if [ "$kind" = text ]; then printf %s "$stdin"; else printf %s "$stdin" | base64 -d; fi; }
while read -r marker seconds kind script_length stdin_length; do
    LC_ALL=C read -r -N "$script_length" script
    LC_ALL=C read -r -N "$stdin_length" stdin
    stdin | timeout -k 1 "$seconds" bash -c "$script" sandbox 2>&1
    code=${PIPESTATUS[1]}
    kill -9 -1
    killed=0
    for file in /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control; do
        [ -r "$file" ] && while read -r name count; do
            [ "$name" = oom_kill ] && killed=$count
        done < "$file"
    done
    printf '\n%s %s %s\n' "$marker" "$code" "$killed"
done 2>/dev/null
