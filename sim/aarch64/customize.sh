#!/bin/sh
# Makes the machine's disk, as root on the building machine. Inputs come in the environment, from sim/aarch64/bed.py.
# Nothing of the recipe may be put in here but the shards of the model, which are too long to be moved.
set -eu
root=$(mktemp -d "$(dirname "$DISK")/root-XXXXXX")
trap 'rm -rf --one-file-system "$root"' EXIT
chmod 0755 "$root"
tar -C "$root" --numeric-owner -xf "$ROOT_TAR"
tar -C "$root" --numeric-owner -xf "$BOOT_TAR" ./lib/modules
for release in "$root"/lib/modules/*; do depmod -b "$root" "${release##*/}"; done

echo spark-aarch64 >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 spark-aarch64\n' >"$root/etc/hosts"
echo nameserver 10.0.2.3 >"$root/etc/resolv.conf"
install -m 0644 "$GUEST/lab.network" "$root/etc/systemd/network/lab.network"
for name in registry hub; do
    install -m 0644 "$GUEST/lab-$name.socket" "$root/etc/systemd/system/lab-$name.socket"
    ln -sf "../lab-$name.socket" "$root/etc/systemd/system/sockets.target.wants/lab-$name.socket"
done
for pair in "registry $REGISTRY_PORT" "hub $HUB_PORT"; do
    set -- $pair
    sed "s/@NAME@/$1/g; s/@PORT@/$2/g" "$GUEST/lab.service" >"$root/etc/systemd/system/lab-$1.service"
done
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
ln -sf /lib/systemd/system/systemd-networkd.service "$root/etc/systemd/system/multi-user.target.wants/"
for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer \
    dpkg-db-backup.timer systemd-networkd-wait-online.service getty@tty1.service serial-getty@ttyAMA0.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done

# The model's stand-in takes its memory as huge pages that are never touched.
echo vm.nr_overcommit_hugepages=65536 >"$root/etc/sysctl.d/90-double.conf"

# Doubles of NVIDIA's programs.
install -D -m 0755 "$GUEST/nvidia-smi" "$root/usr/bin/nvidia-smi"
install -D -m 0755 "$GUEST/nvidia-container-runtime" "$root/usr/bin/nvidia-container-runtime"
install -D -m 0755 "$GUEST/nvidia-container-runtime-hook" "$root/usr/bin/nvidia-container-runtime-hook"
install -D -m 0644 "$GUEST/daemon.json" "$root/etc/docker/daemon.json"

# Login.
uid=1000
echo "$LOGIN:x:$uid:$uid::/home/$LOGIN:/bin/bash" >>"$root/etc/passwd"
echo "$LOGIN:x:$uid:" >>"$root/etc/group"
echo "$LOGIN:*:19000:0:99999:7:::" >>"$root/etc/shadow"
install -d -o $uid -g $uid -m 0755 "$root/home/$LOGIN"
install -d -o $uid -g $uid -m 0700 "$root/home/$LOGIN/.ssh"
install -o $uid -g $uid -m 0600 "$LOGIN_KEY" "$root/home/$LOGIN/.ssh/authorized_keys"
echo "$LOGIN ALL=(ALL) NOPASSWD:ALL" >"$root/etc/sudoers.d/$LOGIN"
chmod 0440 "$root/etc/sudoers.d/$LOGIN"
printf 'PasswordAuthentication no\nPermitRootLogin no\nUseDNS no\nHostKey /etc/ssh/ssh_host_ed25519_key\n' \
    >"$root/etc/ssh/sshd_config.d/lab.conf"
# Known before the first connection, so that it is checked from the first connection on.
rm -f "$root"/etc/ssh/ssh_host_*
install -m 0600 "$HOST_KEY" "$root/etc/ssh/ssh_host_ed25519_key"
install -m 0644 "$HOST_KEY.pub" "$root/etc/ssh/ssh_host_ed25519_key.pub"
: >"$root/etc/machine-id"
install -d -m 2755 "$root/var/log/journal"

# What this machine needs to reach package mirrors and indexes, the emulated one needs too.
if [ -d "$LAB/certificates" ]; then
    install -d "$root/usr/local/share/ca-certificates"
    for certificate in "$LAB"/certificates/*.crt; do
        install -m 0644 "$certificate" "$root/usr/local/share/ca-certificates/"
        cat "$certificate" >>"$root/etc/ssl/certs/ca-certificates.crt"
    done
fi
if [ -f "$LAB/pip.conf" ]; then install -m 0644 "$LAB/pip.conf" "$root/etc/pip.conf"; fi
if [ -f "$LAB/environment" ]; then cat "$LAB/environment" >>"$root/etc/environment"; fi
if [ -f "$LAB/apt.conf" ]; then install -D -m 0644 "$LAB/apt.conf" "$root/etc/apt/apt.conf.d/90lab"; fi

# A download that was cut off: the shards are there, and at the first boot they are noted as verified.
mkdir -p "$root/$PARTIAL"
cp --sparse=always "$SHARDS"/*.safetensors "$root/$PARTIAL/"
install -D -m 0755 "$GUEST/note-shards" "$root/usr/local/lib/double/note-shards"
install -D -m 0644 "$SHARDS/.hub-manifest.json" "$root/usr/local/lib/double/hub-manifest.json"
sed "s|@FOLDER@|/$PARTIAL|" "$GUEST/note-shards.service" >"$root/etc/systemd/system/note-shards.service"
ln -sf ../note-shards.service "$root/etc/systemd/system/multi-user.target.wants/note-shards.service"

rm -f "$DISK"
truncate -s "${DISK_GIB}G" "$DISK"
mke2fs -q -t ext4 -i 262144 -E lazy_itable_init=1,lazy_journal_init=1 -d "$root" "$DISK"
