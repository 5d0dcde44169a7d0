# Every call of libnbd that has a server do something, against ours. Run by
# TestInteropServer in nbdsh, with URI (nbd://HOST:PORT/), HOST, PORT and SOCKET set.
# Exports, 8 MiB each: mem (in memory), sparse (every other aligned 64 KiB is a hole;
# trim, cache, zeroes), ro, blocks (of 4096).
import errno
import os
import select
import socket
import threading

MiB = 1 << 20
SIZE = 8 * MiB
seen = set()


class H(nbd.NBD):
    """A handle that notes which calls were made."""

    def __getattribute__(self, name):
        if not name.startswith("_"):
            seen.add(name)
        return super().__getattribute__(name)


def connected(name, *contexts, **settings):
    h = H()
    for c in contexts:
        h.add_meta_context(c)
    for k, v in settings.items():
        getattr(h, "set_" + k)(v)
    h.connect_uri(URI + name)
    return h


def fails(want, f, *args):
    try:
        f(*args)
    except nbd.Error as e:
        assert want is None or e.errnum == want, (e.errnum, want, e.string)
    else:
        assert False, "no error, want %s" % want


def drain(h):
    while h.aio_in_flight() > 0:
        assert h.poll(10000) == 1


# --- ways to connect
h = H()
h.set_export_name("mem")
h.connect_tcp(HOST, PORT)
assert h.get_size() == SIZE and h.get_protocol() == "newstyle-fixed"
h.shutdown()
h = H()
h.set_export_name("mem")
h.connect_unix(SOCKET)
assert h.get_size() == SIZE
h.shutdown(nbd.SHUTDOWN_ABANDON_PENDING)
h = H()
h.set_export_name("mem")
s = socket.create_connection((HOST, int(PORT)))
h.connect_socket(s.detach())
assert h.pread(16, 0)
h.shutdown()


def wait_ready(h):
    while h.aio_is_connecting():
        assert h.poll(10000) == 1
    assert h.aio_is_ready() and not h.aio_is_dead() and not h.aio_is_closed() and not h.aio_is_processing(), h.connection_state()


for connect in (lambda h: h.aio_connect_uri(URI + "mem"), lambda h: h.aio_connect_tcp(HOST, PORT), lambda h: h.aio_connect_unix(SOCKET),
                lambda h: h.aio_connect_socket(socket.create_connection((HOST, int(PORT))).detach())):
    h = H()
    assert h.aio_is_created()
    h.set_export_name("mem")
    connect(h)
    wait_ready(h)
    h.aio_disconnect()
    while not h.aio_is_closed():
        assert h.poll(10000) == 1

# --- what the handshake may look like
h = connected("mem", handshake_flags=0)  # neither fixed newstyle nor NO_ZEROES: NBD_OPT_EXPORT_NAME
assert h.get_size() == SIZE and h.get_protocol() == "newstyle" and h.get_handshake_flags() == 0
assert h.pread(4096, 0) == connected("mem").pread(4096, 0)
h = connected("mem", handshake_flags=nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE)
assert h.get_handshake_flags() == nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE and h.get_size() == SIZE
h = connected("mem", request_structured_replies=False)
assert not h.get_structured_replies_negotiated() and not h.can_df()
assert len(h.pread(MiB, 5)) == MiB
h = connected("mem")
assert h.get_structured_replies_negotiated() and h.can_df()
h = connected("blocks", full_info=True)
assert [h.get_block_size(k) for k in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)] == [4096, 4096, MiB]
assert connected("mem", request_block_size=False).get_size() == SIZE
fails(errno.EINVAL, lambda: connected("blocks", request_block_size=False))  # NBD_REP_ERR_BLOCK_SIZE_REQD
assert not h.get_tls_negotiated()
h = H()
h.set_tls(nbd.TLS_REQUIRE)
fails(None, h.connect_uri, URI + "mem")  # none is offered

# --- what is said of an export
h = connected("mem", full_info=True)
assert h.get_canonical_export_name() in ("mem", ""), h.get_canonical_export_name()
assert not h.is_read_only() and not h.is_rotational()
assert h.can_flush() and h.can_fua() and h.can_zero() and h.can_fast_zero() and h.can_multi_conn()
assert not h.can_trim() and not h.can_cache() and not h.can_meta_context("base:allocation")
h = connected("sparse", "base:allocation", "other:context")
assert h.can_trim() and h.can_cache() and h.can_meta_context("base:allocation") and not h.can_meta_context("other:context")
h = connected("ro")
assert h.is_read_only()
h.set_strict_mode(0)
fails(errno.EPERM, h.pwrite, b"x", 0)
fails(errno.EPERM, h.zero, 4096, 0)

# --- options, one by one
h = H()
h.set_opt_mode(True)
h.connect_uri(URI)
assert h.aio_is_negotiating()
names = []
assert h.opt_list(lambda name, description: names.append(name)) == len(names)
assert {"mem", "sparse", "ro", "blocks"} <= set(names), names
names.clear()
done = []
h.aio_opt_list(lambda name, description: names.append(name), lambda err: done.append(err.value) or 1)
while not done:
    assert h.poll(10000) == 1
assert done == [0] and "mem" in names
h.set_export_name("nothing")
fails(errno.ENOENT, h.opt_info)
fails(errno.ENOENT, h.opt_go)
assert h.aio_is_negotiating()  # a refused export ends nothing
h.set_export_name("ro")
h.opt_info()
assert h.is_read_only() and h.get_size() == SIZE
h.set_export_name("sparse")
done.clear()
h.aio_opt_info(lambda err: done.append(err.value) or 1)
while not done:
    assert h.poll(10000) == 1
assert done == [0] and not h.is_read_only()
contexts = []
for query, want in (([], ["base:allocation"]), (["base:"], ["base:allocation"]), (["base:allocation"], ["base:allocation"]), (["qemu:"], [])):
    h.clear_meta_contexts()
    for q in query:
        h.add_meta_context(q)
    contexts.clear()
    h.opt_list_meta_context(lambda name: contexts.append(name))
    assert contexts == want, (query, contexts)
contexts.clear()
done.clear()
h.clear_meta_contexts()
h.aio_opt_list_meta_context(lambda name: contexts.append(name), lambda err: done.append(err.value) or 1)
while not done:
    assert h.poll(10000) == 1
assert done == [0] and contexts == ["base:allocation"], contexts
h.add_meta_context("base:allocation")
h.opt_go()
assert h.aio_is_ready() and h.can_meta_context("base:allocation")
h.shutdown()
h = H()
h.set_opt_mode(True)
h.set_export_name("mem")
h.connect_uri(URI + "mem")
done.clear()
h.aio_opt_go(lambda err: done.append(err.value) or 1)
while not done:
    assert h.poll(10000) == 1
assert done == [0] and h.get_size() == SIZE
h.shutdown()
for abort in (lambda h: h.opt_abort(), lambda h: h.aio_opt_abort()):
    h = H()
    h.set_opt_mode(True)
    h.connect_uri(URI)
    abort(h)
    while not h.aio_is_closed():
        assert h.poll(10000) == 1

# --- commands, one at a time
h = connected("sparse", "base:allocation")
a, b = bytearray(os.urandom(3 * 65536)), bytearray(os.urandom(65536))
h.pwrite(a, 2 * MiB)
h.pwrite(b, 2 * MiB + 65536, nbd.CMD_FLAG_FUA)
a[65536 : 2 * 65536] = b
assert h.pread(len(a), 2 * MiB) == a
h.zero(65536, 2 * MiB + 65536, nbd.CMD_FLAG_FUA)
h.zero(65536, 2 * MiB, nbd.CMD_FLAG_NO_HOLE)
a[: 2 * 65536] = bytes(2 * 65536)
assert h.pread(len(a), 2 * MiB) == a
chunks = []
assert h.pread_structured(len(a), 2 * MiB, lambda buf, off, status, err: chunks.append((off - 2 * MiB, len(buf), status))) == a
assert chunks == [(0, 2 * 65536, nbd.READ_HOLE), (2 * 65536, 65536, nbd.READ_DATA)], chunks
chunks.clear()
assert h.pread_structured(len(a), 2 * MiB, lambda buf, off, status, err: chunks.append((off - 2 * MiB, len(buf), status)), nbd.CMD_FLAG_DF) == a
assert chunks == [(0, len(a), nbd.READ_DATA)], chunks
got = []
h.block_status(len(a), 2 * MiB, lambda context, off, entries, err: got.append((context, off, list(entries))))
assert got == [("base:allocation", 2 * MiB, [2 * 65536, 3, 65536, 0])], got
h.trim(65536, 0)
h.trim(65536, 0, nbd.CMD_FLAG_FUA)
h.cache(MiB, 0)
h.flush()
h.set_strict_mode(0)  # libnbd must not refuse what the server is to refuse
assert h.pread(0, 0) == bytearray(0)
for cmd, want in ((lambda: h.pread(2, SIZE - 1), errno.EINVAL), (lambda: h.pwrite(b"xx", SIZE - 1), errno.ENOSPC), (lambda: h.zero(2, SIZE - 1), errno.ENOSPC),
                  (lambda: h.trim(2, SIZE - 1), errno.EINVAL), (lambda: h.cache(2, SIZE - 1), errno.EINVAL), (lambda: h.block_status(2, SIZE - 1, lambda *x: 0), errno.EINVAL),
                  (lambda: h.pread(1, 1 << 62), errno.EINVAL), (lambda: h.pread(1, 0, 1 << 14), errno.EINVAL), (lambda: h.flush(1 << 14), errno.EINVAL),
                  (lambda: h.pread(1, 0, nbd.CMD_FLAG_NO_HOLE), errno.EINVAL)):
    fails(want, cmd)
assert h.pread(len(a), 2 * MiB) == a  # and the connection is none the worse
h.shutdown()
h = connected("blocks")
h.set_strict_mode(0)
fails(errno.EINVAL, h.pread, 512, 0)
fails(errno.EINVAL, h.pwrite, b"x" * 4096, 512)
h.pwrite(b"x" * 4096, 8192)
assert h.pread(4096, 8192) == b"x" * 4096

# --- commands, many in flight, in any order, by the asynchronous calls
h = connected("sparse", "base:allocation")
N, UNIT = 48, 4096
want = [os.urandom(UNIT) for _ in range(N)]
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(w)), 4 * MiB + i * UNIT) for i, w in enumerate(want)]
assert 0 < h.aio_in_flight() <= N
drain(h)
assert all(h.aio_command_completed(c) for c in cookies)
h.aio_flush()
h.aio_cache(MiB, 0)
h.aio_trim(65536, 0)
drain(h)
status, pieces, ended = [], [], []
bufs = [nbd.Buffer(UNIT) for _ in range(N)]
for i in reversed(range(N)):
    h.aio_pread(bufs[i], 4 * MiB + i * UNIT, lambda err: ended.append(err.value) or 1)
part = nbd.Buffer(2 * 65536)
h.aio_pread_structured(part, 2 * MiB, lambda buf, off, st, err: pieces.append(st))
h.aio_block_status(MiB, 4 * MiB, lambda context, off, entries, err: status.append(list(entries)))
h.aio_zero(UNIT, 5 * MiB)
drain(h)
assert ended == [0] * N and [bytes(x.to_bytearray()) for x in bufs] == want
assert pieces == [nbd.READ_HOLE] and sum(status[0][::2]) == MiB, (pieces, status)
# by hand, with the descriptor, as an application with its own loop
one = nbd.Buffer(UNIT)
c = h.aio_pread(one, 4 * MiB)
p = select.poll()
while not h.aio_command_completed(c):
    way = h.aio_get_direction()
    p.register(h.aio_get_fd(), (select.POLLIN if way & nbd.AIO_DIRECTION_READ else 0) | (select.POLLOUT if way & nbd.AIO_DIRECTION_WRITE else 0))
    for _, ev in p.poll(10000):
        if ev & select.POLLIN and way & nbd.AIO_DIRECTION_READ:
            h.aio_notify_read()
        elif ev & select.POLLOUT:
            h.aio_notify_write()
assert bytes(one.to_bytearray()) == want[0]
# a polite end while requests are in flight: they are answered first
cookies = [h.aio_pread(nbd.Buffer(UNIT), i * UNIT) for i in range(N)]
h.shutdown()
assert all(h.aio_command_completed(c) for c in cookies)

# --- several connections to one export: what one has written and flushed, the others read
hs = [connected("mem") for _ in range(4)]
for r in range(20):
    w = os.urandom(UNIT)
    hs[r % 4].pwrite(w, r * UNIT)
    hs[r % 4].flush()
    assert all(x.pread(UNIT, r * UNIT) == w for x in hs)
errors = []


def worker(h, k):
    try:
        for r in range(50):
            w = bytes([k * 50 + r & 255]) * UNIT
            h.pwrite(w, MiB + k * UNIT)
            assert h.pread(UNIT, MiB + k * UNIT) == w
    except Exception as e:
        errors.append(e)


threads = [threading.Thread(target=worker, args=(h, k)) for k, h in enumerate(hs)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not errors, errors
[h.shutdown() for h in hs]

# --- was any call left out?
reach = """connect_tcp connect_unix connect_socket connect_uri aio_connect_uri aio_connect_tcp aio_connect_unix aio_connect_socket
opt_list opt_info opt_go opt_abort opt_list_meta_context aio_opt_list aio_opt_info aio_opt_go aio_opt_abort aio_opt_list_meta_context
add_meta_context set_handshake_flags set_full_info set_request_structured_replies set_request_block_size set_tls
get_size get_block_size get_protocol get_canonical_export_name get_structured_replies_negotiated get_tls_negotiated is_read_only is_rotational
can_flush can_fua can_zero can_fast_zero can_multi_conn can_trim can_cache can_df can_meta_context
pread pread_structured pwrite zero trim cache flush block_status shutdown poll
aio_pread aio_pread_structured aio_pwrite aio_zero aio_trim aio_cache aio_flush aio_block_status aio_disconnect
aio_get_fd aio_get_direction aio_notify_read aio_command_completed""".split()
left = sorted(set(reach) - seen)
assert not left, left
