# The service of a machine, with all that its unit takes from it.
mkdir -p ~/.config/systemd/user ~/.cache
cp headrace.service ~/.config/systemd/user/
systemctl --user daemon-reload
systemctl --user start headrace.service
for _ in $(seq 600); do
    curl --silent --fail --output /dev/null http://127.0.0.1:11511/health/ready && break
    sleep 0.1
done
curl --silent --fail http://127.0.0.1:11511/v1/chat/completions -H 'Content-Type: application/json' \
    -d '{"model": "'"$(curl --silent http://127.0.0.1:11511/v1/models | sed 's/.*"id":"\([^"]*\)".*/\1/')"'", "max_tokens": 4, "messages": [{"role": "user", "content": "Say hi"}]}'
grep Seccomp: "/proc/$(systemctl --user show --value --property=MainPID headrace.service)/status"
