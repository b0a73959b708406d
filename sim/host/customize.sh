#!/bin/sh
# Run by mmdebstrap on the machine: $1 is the new root folder. Files come from this script's folder, the lab's
# certificates and settings from $SIM_LAB. Nothing of the recipe may be put in here: the host must be fresh.
set -eu
root=$1
here=$(dirname "$(readlink -f "$0")")

install -D -o root -g root -m 0755 "$here/entry" "$root/usr/local/lib/sim/entry"
for unit in lab-registry.socket lab-registry.service lab-hub.socket lab-hub.service; do
    install -D -o root -g root -m 0644 "$here/$unit" "$root/etc/systemd/system/$unit"
done
chroot "$root" systemctl enable lab-registry.socket lab-hub.socket

chroot "$root" useradd --create-home --shell /bin/bash spark
install -D -o root -g root -m 0440 /dev/stdin "$root/etc/sudoers.d/spark" <<'EOF'
spark ALL=(ALL) NOPASSWD:ALL
EOF
install -D -o root -g root -m 0644 /dev/stdin "$root/etc/ssh/sshd_config.d/lab.conf" <<'EOF'
PasswordAuthentication no
PermitRootLogin no
UseDNS no
EOF

# Each host makes its own keys and machine id at its first boot.
rm -f "$root"/etc/ssh/ssh_host_*
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"

# The journal outlives a reboot, as on a real Spark.
install -d -o root -g root -m 2755 "$root/var/log/journal"

# What this machine needs to reach package mirrors and indexes, the simulated host needs too.
if [ -d "$SIM_LAB/certificates" ]; then
    install -d "$root/usr/local/share/ca-certificates"
    install -o root -g root -m 0644 "$SIM_LAB"/certificates/*.crt "$root/usr/local/share/ca-certificates/"
    chroot "$root" update-ca-certificates >/dev/null
fi
if [ -f "$SIM_LAB/pip.conf" ]; then install -o root -g root -m 0644 "$SIM_LAB/pip.conf" "$root/etc/pip.conf"; fi
if [ -f "$SIM_LAB/environment" ]; then cat "$SIM_LAB/environment" >>"$root/etc/environment"; fi
if [ -f "$SIM_LAB/apt.conf" ]; then
    install -D -o root -g root -m 0644 "$SIM_LAB/apt.conf" "$root/etc/apt/apt.conf.d/90lab"
fi
