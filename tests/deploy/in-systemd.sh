# Starts the systemd of a user, in mounts and cgroups of its own, and runs a script beside it.
set -euo pipefail
mount -t tmpfs none /run
mkdir -p /run/systemd/system /run/user
chmod 700 /run/user
umount --lazy /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mkdir -p /run/home
export XDG_RUNTIME_DIR=/run/user HOME=/run/home
/lib/systemd/systemd --user </dev/null >/dev/null 2>&1 &
manager=$!
for _ in $(seq 100); do
    systemctl --user is-system-running >/dev/null 2>&1 && break
    sleep 0.1
done
status=0
bash -euo pipefail "$1" || status=$?
[ $status = 0 ] || systemctl --user status --no-pager headrace.service >&2 || true
systemctl --user stop headrace.service 2>/dev/null || true
kill $manager
exit $status
