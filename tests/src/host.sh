# The first process of a `Host`: gives it mounts of its own, and waits. Executed twice, once to be put into a cgroup of
# its own, and once as the first process of its namespaces.
#
# $1 what to do   $2 its name   $3 its disk   $4 the folder with Weft's programs

case $1 in
enter)
    # The unified hierarchy alone, whatever the machine has: every runtime understands it, also without controllers.
    mount --make-rprivate /
    mount -t cgroup2 none /sys/fs/cgroup
    mkdir -p "/sys/fs/cgroup/$2"
    echo 0 >"/sys/fs/cgroup/$2/cgroup.procs"
    exec unshare --pid --fork --kill-child --cgroup sh -eu "$0" first "$2" "$3" "$4"
    ;;
first)
    mount -t tmpfs -o mode=755 none /run
    mkdir -p /run/test/programs /run/test/disk /run/netns /run/lock
    mount --bind "$4" /run/test/programs
    mount --bind "$3" /run/test/disk
    cp "$0" /run/test/host.sh
    disk=/run/test/disk
    [ -e $disk/etc ] || cp -a /etc $disk/etc
    mkdir -p $disk/lib $disk/opt $disk/tmp $disk/log
    mount --bind $disk/etc /etc
    mount --bind $disk/lib /var/lib
    mount --bind $disk/opt /opt
    mount --bind $disk/tmp /var/tmp
    mount -t proc none /proc
    # The same again, as seen from inside of the cgroup.
    umount /sys/fs/cgroup
    mount -t cgroup2 none /sys/fs/cgroup
    mkdir -p /sys/fs/cgroup/first
    echo 0 >/sys/fs/cgroup/first/cgroup.procs
    # Each boot has its identity, which this machine's kernel cannot change.
    cat /proc/sys/kernel/random/uuid >/run/test/boot_id
    mount --bind /run/test/boot_id /proc/sys/kernel/random/boot_id
    cd /
    touch /run/test/booted
    # The shell reaps whatever loses its parent.
    sleep infinity &
    wait
    ;;
esac
