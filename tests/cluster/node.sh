# The first process of a node: gives it mounts of its own, so that each kubelet, containerd and Weft has the folders that it has on a
# computer of its own, and waits. It is started in the node's network, mount and process namespaces.
#
# $1 the node's name   $2 its disk   $3 the folder with Kubernetes' programs   $4 a folder with files to look at

mount --make-rprivate /
mount -t proc none /proc
mount -t sysfs none /sys
# What the machine has of cgroups, as it has it; `ip netns exec` hides it.
mount -t tmpfs -o mode=755 none /sys/fs/cgroup
while read -r type point options; do
    case $type in
    cgroup)
        mkdir -p "$point"
        mount -t cgroup -o "$options" none "$point"
        ;;
    cgroup2)
        [ "$point" = /sys/fs/cgroup ] || mkdir -p "$point"
        mount -t cgroup2 none "$point"
        ;;
    esac
done <"$4/cgroups"

mount -t tmpfs -o mode=755 none /run
mkdir -p /run/netns /run/lock /run/disk /run/kubernetes /run/files /run/tunables
mount --bind "$2" /run/disk
mount --bind "$3" /run/kubernetes
mount --bind "$4" /run/files
if ! [ -e /run/disk/etc ]; then
    cp -a /etc /run/disk/etc
    # Networks of this machine that the node is to know nothing of.
    rm -rf /run/disk/etc/cni
fi
for folder in lib opt tmp log; do mkdir -p /run/disk/$folder; done
rm -f /run/disk/etc/resolv.conf
echo "nameserver 198.51.100.53" >/run/disk/etc/resolv.conf
echo "$1" >/run/disk/etc/hostname
hostname "$1"
mount --bind /run/disk/etc /etc
mount --bind /run/disk/lib /var/lib
mount --bind /run/disk/opt /opt
mount --bind /run/disk/tmp /var/tmp
mount --bind /run/disk/log /var/log
# kubelet sets these, which are the machine's: it finds them as it wants them.
while read -r value tunable; do
    echo "$value" >"/run/tunables/$(basename "$tunable")"
    mount --bind "/run/tunables/$(basename "$tunable")" "/proc/sys/$tunable"
done <<TUNABLES
1 vm/overcommit_memory
0 vm/panic_on_oom
10 kernel/panic
1 kernel/panic_on_oops
1000000 kernel/keys/root_maxkeys
25000000 kernel/keys/root_maxbytes
TUNABLES
mount --make-rshared /
cd /
touch /run/booted
sleep infinity &
wait
