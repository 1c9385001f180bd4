# A service of a user, from its installation to its removal.
printf '[server]\nport = 11599\n[models.echo]\nmodel = "echo"\n' > headrace.toml
ready() {
    for _ in $(seq 300); do
        systemctl --user show headrace.service --property=StatusText,MainPID | grep -v "=$1$" | grep -q MainPID \
            && systemctl --user show headrace.service --property=StatusText | grep -q Ready && return
        sleep 0.1
    done
    return 1
}
headrace service install
ready 0
headrace service status
first=$(systemctl --user show --value --property=MainPID headrace.service)
kill -KILL "$first"
ready "$first"
echo "started again"
headrace service status --json
headrace service uninstall
