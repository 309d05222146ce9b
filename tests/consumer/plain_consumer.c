/* A plain C user of smmufast.h: translations, batches and walks without the lock. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "smmufast.h"

static smmufast_api *api;

/* The caller's own copy of memory: what it answers fetches from. */
typedef struct {
    uint64_t base;
    const uint8_t *bytes;
    uint64_t size;
} image_t;

static const void *image_at(const image_t *image, uint64_t address, uint64_t n)
{
    uint64_t offset = address - image->base;
    if (offset > image->size || n > image->size - offset)
        return NULL;
    return image->bytes + offset;
}

/* What a walk asked for, and whether it got it. */
typedef struct {
    smmufast_fetch fetch;
    int aborted;
} asked_t;

/* `asked` may be NULL; else there is room for `*count`, which becomes how many there are. */
static int run_walk(smmufast_smmu *smmu, const image_t *image, const smmufast_request *request,
                    smmufast_walk *walk, asked_t *asked, size_t *count)
{
    size_t n = 0;
    walk->size = sizeof *walk;
    walk->flags = 0;
    int status = api->walk_start(smmu, request, walk);
    while (status == SMMUFAST_PENDING) {
        const void *data = image_at(image, walk->fetch.address, walk->fetch.size);
        if (asked != NULL && n < *count)
            asked[n++] = (asked_t){walk->fetch, data == NULL};
        status = api->walk_supply(smmu, walk, data);
    }
    if (asked != NULL)
        *count = n;
    return status;
}

static PyObject *result_tuple(const smmufast_result *r)
{
    static const char none[32];
    return Py_BuildValue("(KiiiiiiiiKiy#)", (unsigned long long)r->pa, r->action, r->event,
                         r->fault, r->perm, r->level, r->page_lg2, r->attr, r->sh,
                         (unsigned long long)(r->action == SMMUFAST_OK ? r->ipa : 0), r->stage,
                         r->event ? (const char *)r->record : none, (Py_ssize_t)32);
}

/* translate(smmu, sid, ssid, iova, access, which="translate") -> (status, result); `which` is also
 * "peek" or "ats_translated" */
static PyObject *py_translate(PyObject *module, PyObject *args)
{
    PyObject *object;
    const char *which = "translate";
    int (*call)(smmufast_smmu *, const smmufast_request *, smmufast_result *);
    smmufast_request request = {0};
    smmufast_result result;
    unsigned long long iova;
    unsigned int sid, ssid, access;
    int status;
    (void)module;
    if (!PyArg_ParseTuple(args, "OIIKI|s", &object, &sid, &ssid, &iova, &access, &which))
        return NULL;
    smmufast_smmu *smmu = api->acquire(object);
    if (smmu == NULL)
        return NULL;
    call = strcmp(which, "peek") == 0 ? api->peek
        : strcmp(which, "ats_translated") == 0 ? api->ats_translated : api->translate;
    request.sid = sid;
    request.ssid = ssid;
    request.iova = iova;
    request.access = access;
    memset(&result, 0xEE, sizeof result);
    Py_BEGIN_ALLOW_THREADS
    status = call(smmu, &request, &result);
    Py_END_ALLOW_THREADS
    api->release(smmu);
    return Py_BuildValue("(iN)", status, result_tuple(&result));
}

/* told(smmu, what, opened=0): "generation", "open" or "close" */
static PyObject *py_told(PyObject *module, PyObject *args)
{
    PyObject *object;
    const char *what;
    unsigned long long opened = 0, found;
    (void)module;
    if (!PyArg_ParseTuple(args, "Os|K", &object, &what, &opened))
        return NULL;
    smmufast_smmu *smmu = api->acquire(object);
    if (smmu == NULL)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (strcmp(what, "generation") == 0)
        found = api->generation(smmu);
    else if (strcmp(what, "open") == 0)
        found = api->transaction_open(smmu);
    else
        found = (unsigned long long)api->transaction_close(smmu, opened);
    Py_END_ALLOW_THREADS
    api->release(smmu);
    return PyLong_FromUnsignedLongLong(found);
}

/* ats(smmu, sid, ssid, iova, access, no_write, execute, stu_lg2, size)
 * -> (status, how it ended, granted, split, address, bytes, event) */
static PyObject *py_ats(PyObject *module, PyObject *args)
{
    PyObject *object;
    smmufast_request request = {0};
    smmufast_ats ats;
    unsigned long long iova;
    unsigned int sid, ssid, access, size;
    int no_write, execute, stu, status;
    (void)module;
    memset(&ats, 0xEE, sizeof ats);
    if (!PyArg_ParseTuple(args, "OIIKIiiiI", &object, &sid, &ssid, &iova, &access, &no_write,
                          &execute, &stu, &size))
        return NULL;
    smmufast_smmu *smmu = api->acquire(object);
    if (smmu == NULL)
        return NULL;
    request.sid = sid;
    request.ssid = ssid;
    request.iova = iova;
    request.access = access;
    ats.size = size ? size : sizeof ats;
    ats.no_write = (uint8_t)no_write;
    ats.execute = (uint8_t)execute;
    ats.stu_lg2 = (uint8_t)stu;
    Py_BEGIN_ALLOW_THREADS
    status = api->ats_request(smmu, &request, &ats);
    Py_END_ALLOW_THREADS
    api->release(smmu);
    return Py_BuildValue("(iiiiKKi)", status, ats.status, ats.granted, ats.split,
                         (unsigned long long)ats.address, 1ULL << (ats.page_lg2 & 63),
                         ats.result.event);
}

/* walk(smmu, base, image, sid, ssid, iova, access) -> (status, result, [fetch, ...]) */
static PyObject *py_walk(PyObject *module, PyObject *args)
{
    PyObject *object, *fetches;
    Py_buffer bytes;
    smmufast_request request = {0};
    smmufast_walk walk;
    asked_t asked[64];
    size_t count = 64;
    unsigned long long base, iova;
    unsigned int sid, ssid, access;
    int status;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKy*IIKI", &object, &base, &bytes, &sid, &ssid, &iova, &access))
        return NULL;
    smmufast_smmu *smmu = api->acquire(object);
    if (smmu == NULL) {
        PyBuffer_Release(&bytes);
        return NULL;
    }
    image_t image = {base, bytes.buf, (uint64_t)bytes.len};
    request.sid = sid;
    request.ssid = ssid;
    request.iova = iova;
    request.access = access;
    Py_BEGIN_ALLOW_THREADS
    status = run_walk(smmu, &image, &request, &walk, asked, &count);
    Py_END_ALLOW_THREADS
    api->release(smmu);
    PyBuffer_Release(&bytes);
    fetches = PyList_New(0);
    for (size_t i = 0; fetches != NULL && i < count; i++) {
        const smmufast_fetch *fetch = &asked[i].fetch;
        PyObject *item = Py_BuildValue("(iiKii)", fetch->kind, fetch->level,
                                       (unsigned long long)fetch->address, fetch->size,
                                       asked[i].aborted);
        if (item == NULL || PyList_Append(fetches, item) < 0)
            Py_CLEAR(fetches);
        Py_XDECREF(item);
    }
    return Py_BuildValue("(iNN)", status, result_tuple(&walk.result), fetches);
}

/* --- a walk step by step; its struct is a bytearray of the caller --- */

static smmufast_walk *walk_in(Py_buffer *view)
{
    if ((size_t)view->len < sizeof(smmufast_walk)) {
        PyErr_SetString(PyExc_ValueError, "walk: too short");
        return NULL;
    }
    return view->buf;
}

/* step(what, smmu, walk, ...) -> status; start: sid, iova, access, flags; supply: data or None */
static PyObject *py_step(PyObject *module, PyObject *args)
{
    const char *what;
    PyObject *object, *data = Py_None;
    Py_buffer view, answer = {0};
    unsigned long long iova = 0;
    unsigned int sid = 0, access = 0, flags = 0;
    int status;
    (void)module;
    what = PyUnicode_AsUTF8(PyTuple_GetItem(args, 0));
    if (what == NULL)
        return NULL;
    if (strcmp(what, "start") == 0) {
        if (!PyArg_ParseTuple(args, "sOw*IKII", &what, &object, &view, &sid, &iova, &access,
                              &flags))
            return NULL;
    } else if (!PyArg_ParseTuple(args, "sOw*|O", &what, &object, &view, &data)) {
        return NULL;
    }
    smmufast_walk *walk = walk_in(&view);
    smmufast_smmu *smmu = walk == NULL ? NULL : api->acquire(object);
    if (smmu == NULL || (data != Py_None && PyObject_GetBuffer(data, &answer, PyBUF_SIMPLE) < 0))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (strcmp(what, "start") == 0) {
        smmufast_request request = {iova, sid, SMMUFAST_NO_SSID, access, 0};
        walk->size = sizeof *walk;
        walk->flags = flags;
        status = api->walk_start(smmu, &request, walk);
    } else if (strcmp(what, "supply") == 0) {
        status = api->walk_supply(smmu, walk, answer.buf);
    } else if (strcmp(what, "look") == 0) {
        status = api->walk_look(smmu, walk);
    } else {
        status = api->walk_drop(smmu, walk);
    }
    Py_END_ALLOW_THREADS
    api->release(smmu);
    if (answer.obj != NULL)
        PyBuffer_Release(&answer);
    PyBuffer_Release(&view);
    return PyLong_FromLong(status);
}

/* fetch_of(walk) -> (kind, level, address, size, expected, desired) */
static PyObject *py_fetch_of(PyObject *module, PyObject *object)
{
    Py_buffer view;
    (void)module;
    if (PyObject_GetBuffer(object, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    smmufast_walk *walk = walk_in(&view);
    smmufast_fetch fetch = walk == NULL ? (smmufast_fetch){0} : walk->fetch;
    PyBuffer_Release(&view);
    return walk == NULL ? NULL : Py_BuildValue(
        "(iiKiKK)", fetch.kind, fetch.level, (unsigned long long)fetch.address, fetch.size,
        (unsigned long long)fetch.expected, (unsigned long long)fetch.desired);
}

/* result_of(walk) -> result */
static PyObject *py_result_of(PyObject *module, PyObject *object)
{
    Py_buffer view;
    PyObject *result;
    (void)module;
    if (PyObject_GetBuffer(object, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    smmufast_walk *walk = walk_in(&view);
    result = walk == NULL ? NULL : result_tuple(&walk->result);
    PyBuffer_Release(&view);
    return result;
}

/* sizes() -> of the walk, and where its state starts */
static PyObject *py_sizes(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return Py_BuildValue("(nn)", (Py_ssize_t)sizeof(smmufast_walk),
                         (Py_ssize_t)offsetof(smmufast_walk, state));
}

/* The columns of a batch, from a tuple of buffers in the order of smmufast_batch. */
enum { COLUMNS = 17 };
static const ptrdiff_t widths[COLUMNS] = {4, 4, 8, 1, 8, 1, 1, 1, 1, 1, 1, 1, 1, 8, 1, 32, 2};

static int fill_batch(PyObject *columns, Py_buffer *views, smmufast_batch *batch)
{
    smmufast_column *column = &batch->sid;
    memset(views, 0, COLUMNS * sizeof *views);
    memset(batch, 0, sizeof *batch);
    batch->size = sizeof *batch;
    if (PyTuple_GET_SIZE(columns) != COLUMNS) {
        PyErr_SetString(PyExc_ValueError, "columns: 17 needed");
        return -1;
    }
    for (int i = 0; i < COLUMNS; i++) {
        PyObject *item = PyTuple_GET_ITEM(columns, i);
        if (item == Py_None)
            continue;
        if (PyObject_GetBuffer(item, &views[i], i < 4 ? PyBUF_SIMPLE : PyBUF_WRITABLE) < 0)
            return -1;
        column[i].data = views[i].buf;
        /* a single value is repeated, which only inputs may be */
        column[i].stride = i < 4 && views[i].len == widths[i] ? 0 : widths[i];
        if (column[i].stride)
            batch->n = (size_t)(views[i].len / widths[i]);
    }
    return 0;
}

static void drop_views(Py_buffer *views)
{
    for (int i = 0; i < COLUMNS; i++)
        if (views[i].obj != NULL)
            PyBuffer_Release(&views[i]);
}

/* batch(smmu, columns) -> status */
static PyObject *py_batch(PyObject *module, PyObject *args)
{
    PyObject *object, *columns;
    Py_buffer views[COLUMNS];
    smmufast_batch batch;
    int status, look = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "OO!|i", &object, &PyTuple_Type, &columns, &look))
        return NULL;
    smmufast_smmu *smmu = api->acquire(object);
    if (smmu == NULL)
        return NULL;
    if (fill_batch(columns, views, &batch) < 0) {
        drop_views(views);
        api->release(smmu);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    status = look ? api->peek_batch(smmu, &batch) : api->translate_batch(smmu, &batch);
    Py_END_ALLOW_THREADS
    drop_views(views);
    api->release(smmu);
    return PyLong_FromLong(status);
}

/* --- several threads at once --- */

typedef struct {
    smmufast_smmu *smmu;
    const image_t *image;
    const smmufast_batch *batch;
    long rounds;
    long translations;
    long differences;
} race_t;

static int same(const smmufast_result *a, const smmufast_result *b)
{
    if (a->action != b->action || a->event != b->event || a->fault != b->fault
        || a->perm != b->perm || a->level != b->level || a->page_lg2 != b->page_lg2
        || a->attr != b->attr || a->sh != b->sh || a->asid != b->asid || a->ng != b->ng
        || a->contiguous != b->contiguous || a->stage != b->stage || a->pa != b->pa)
        return 0;
    return a->fault == 0 || memcmp(a->record, b->record, 32) == 0;
}

static smmufast_request request_of(const smmufast_batch *batch, size_t i)
{
    smmufast_request request = {0};
    memcpy(&request.sid, (char *)batch->sid.data + (ptrdiff_t)i * batch->sid.stride, 4);
    memcpy(&request.ssid, (char *)batch->ssid.data + (ptrdiff_t)i * batch->ssid.stride, 4);
    memcpy(&request.iova, (char *)batch->iova.data + (ptrdiff_t)i * batch->iova.stride, 8);
    request.access = ((uint8_t *)batch->access.data)[(ptrdiff_t)i * batch->access.stride];
    return request;
}

/* Every request by itself, as a walk and in a batch: all three must agree. */
static void *race(void *argument)
{
    race_t *mine = argument;
    size_t n = mine->batch->n;
    uint64_t *pa = malloc(n * sizeof *pa);
    uint8_t *event = malloc(n);
    smmufast_batch batch = *mine->batch;
    smmufast_walk walk;
    memset((char *)&batch + offsetof(smmufast_batch, pa), 0,
           sizeof batch - offsetof(smmufast_batch, pa));
    batch.pa = (smmufast_column){pa, sizeof *pa};
    batch.event = (smmufast_column){event, 1};
    for (long round = 0; round < mine->rounds; round++) {
        if (api->translate_batch(mine->smmu, &batch) != SMMUFAST_DONE)
            mine->differences++;
        for (size_t i = 0; i < n; i++) {
            smmufast_request request = request_of(&batch, i);
            smmufast_result result;
            if (api->translate(mine->smmu, &request, &result) != SMMUFAST_DONE
                || run_walk(mine->smmu, mine->image, &request, &walk, NULL, NULL)
                       != SMMUFAST_DONE
                || !same(&result, &walk.result) || result.event != event[i]
                || result.pa != pa[i])
                mine->differences++;
            mine->translations++;
        }
    }
    free(pa);
    free(event);
    return NULL;
}

/* race(smmu, base, image, columns, threads, rounds) -> (translations, differences) */
static PyObject *py_race(PyObject *module, PyObject *args)
{
    enum { MOST = 8 };
    PyObject *object, *columns;
    unsigned long long base;
    Py_buffer bytes, views[COLUMNS];
    smmufast_batch batch;
    pthread_t threads[MOST];
    race_t races[MOST];
    long translations = 0, differences = 0, rounds;
    int n, started = 0;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKy*O!il", &object, &base, &bytes, &PyTuple_Type, &columns, &n,
                          &rounds))
        return NULL;
    smmufast_smmu *smmu = api->acquire(object);
    if (smmu == NULL || n > MOST || fill_batch(columns, views, &batch) < 0)
        return NULL;
    image_t image = {base, bytes.buf, (uint64_t)bytes.len};
    Py_BEGIN_ALLOW_THREADS
    for (int i = 0; i < n; i++) {
        races[i] = (race_t){smmu, &image, &batch, rounds, 0, 0};
        if (pthread_create(&threads[i], NULL, race, &races[i]) != 0)
            break;
        started++;
    }
    for (int i = 0; i < started; i++) {
        pthread_join(threads[i], NULL);
        translations += races[i].translations;
        differences += races[i].differences;
    }
    Py_END_ALLOW_THREADS
    drop_views(views);
    PyBuffer_Release(&bytes);
    api->release(smmu);
    return Py_BuildValue("(ll)", translations, differences);
}

/* --- memory that C answers for --- */

typedef struct {
    smmufast_callbacks callbacks;
    image_t image;
    uint8_t *bytes;
    atomic_long reads;
} host_t;

static int host_read(void *ctx, uint64_t address, void *buf, size_t n)
{
    host_t *host = ctx;
    const void *from = image_at(&host->image, address, n);
    atomic_fetch_add(&host->reads, 1);
    if (from == NULL)
        return -1;
    memcpy(buf, from, n);
    return 0;
}

static int host_write(void *ctx, uint64_t address, const void *buf, size_t n)
{
    host_t *host = ctx;
    if (image_at(&host->image, address, n) == NULL)
        return 1;
    memcpy(host->bytes + (address - host->image.base), buf, n);
    return 0;
}

static void host_free(PyObject *capsule)
{
    host_t *host = PyCapsule_GetPointer(capsule, SMMUFAST_CALLBACKS);
    free(host->bytes);
    free(host);
}

/* host(base, image) -> capsule for Memory.add_callback, over a copy of the image */
static PyObject *py_host(PyObject *module, PyObject *args)
{
    unsigned long long base;
    Py_buffer bytes;
    (void)module;
    if (!PyArg_ParseTuple(args, "Ky*", &base, &bytes))
        return NULL;
    host_t *host = calloc(1, sizeof *host);
    host->bytes = malloc((size_t)bytes.len);
    memcpy(host->bytes, bytes.buf, (size_t)bytes.len);
    host->image = (image_t){base, host->bytes, (uint64_t)bytes.len};
    host->callbacks = (smmufast_callbacks){host_read, host_write, host};
    PyBuffer_Release(&bytes);
    /* the callbacks are the first member: the capsule may point at the whole */
    return PyCapsule_New(host, SMMUFAST_CALLBACKS, host_free);
}

/* reads(capsule) -> how often the host was asked */
static PyObject *py_reads(PyObject *module, PyObject *capsule)
{
    (void)module;
    host_t *host = PyCapsule_GetPointer(capsule, SMMUFAST_CALLBACKS);
    return host == NULL ? NULL : PyLong_FromLong(atomic_load(&host->reads));
}

/* --- a handle that is held --- */

static void drop_handle(PyObject *capsule)
{
    api->release(PyCapsule_GetPointer(capsule, "handle"));
}

/* hold(smmu) -> an object that holds the Smmu until it dies */
static PyObject *py_hold(PyObject *module, PyObject *object)
{
    (void)module;
    smmufast_smmu *smmu = api->acquire(object);
    return smmu == NULL ? NULL : PyCapsule_New(smmu, "handle", drop_handle);
}

/* translate_held(handle, sid, iova) -> (status, result) */
static PyObject *py_translate_held(PyObject *module, PyObject *args)
{
    PyObject *capsule;
    smmufast_request request = {0};
    smmufast_result result;
    unsigned int sid;
    unsigned long long iova;
    (void)module;
    if (!PyArg_ParseTuple(args, "OIK", &capsule, &sid, &iova))
        return NULL;
    smmufast_smmu *smmu = PyCapsule_GetPointer(capsule, "handle");
    if (smmu == NULL)
        return NULL;
    request.sid = sid;
    request.iova = iova;
    request.ssid = SMMUFAST_NO_SSID;
    int status = api->translate(smmu, &request, &result);
    return Py_BuildValue("(iN)", status, result_tuple(&result));
}

/* What ABI 2 had instead of smmufast_batch: no size. */
typedef struct {
    size_t n;
    smmufast_column column[16];
} old_batch_t;

/* misuse(smmu) -> {what: status}: arguments out of range */
static PyObject *py_misuse(PyObject *module, PyObject *object)
{
    smmufast_request request = {0x1000, 1, SMMUFAST_NO_SSID, 0, 0};
    smmufast_result result;
    smmufast_walk walk;
    uint32_t sid = 1, ssids[2] = {SMMUFAST_NO_SSID, 0x100000};
    uint64_t iovas[2] = {0x1000, 0x2000}, pa[2] = {7, 7};
    uint8_t access[2] = {0, 8};
    smmufast_batch good = {.size = sizeof good}, batch;
    struct {
        smmufast_batch batch;
        smmufast_column more[2];
    } newer;
    old_batch_t old = {0};
    (void)module;
    smmufast_smmu *smmu = api->acquire(object);
    if (smmu == NULL)
        return NULL;
    PyObject *found = PyDict_New();
    memset(&walk, 0xEE, sizeof walk);
    walk.size = sizeof walk;
    walk.flags = 0;
#define NOTE(what, value)                                                                         \
    do {                                                                                          \
        PyObject *number = PyLong_FromLong(value);                                                \
        PyDict_SetItemString(found, what, number);                                                \
        Py_DECREF(number);                                                                        \
    } while (0)
    memset(&result, 0x5A, sizeof result);
    request.ssid = 0x100000;
    NOTE("translate ssid", api->translate(smmu, &request, &result));
    NOTE("walk_start ssid", api->walk_start(smmu, &request, &walk));
    request.ssid = SMMUFAST_NO_SSID;
    request.access = 8;
    NOTE("translate access", api->translate(smmu, &request, &result));
    NOTE("walk_start access", api->walk_start(smmu, &request, &walk));
    NOTE("result untouched", result.pa == 0x5A5A5A5A5A5A5A5Au && result.sh == 0x5A);
    request.access = 0;
    NOTE("walk_supply not started", api->walk_supply(smmu, &walk, NULL));
    NOTE("walk_look not started", api->walk_look(smmu, &walk));
    NOTE("walk_drop not started", api->walk_drop(smmu, &walk));
    walk.size = offsetof(smmufast_walk, state) + 8;
    NOTE("walk_start size", api->walk_start(smmu, &request, &walk));
    walk.size = sizeof walk;
    walk.flags = 2;
    NOTE("walk_start flags", api->walk_start(smmu, &request, &walk));
    walk.flags = 0;
    NOTE("walk_start", api->walk_start(smmu, &request, &walk));
    NOTE("walk_supply abort", api->walk_supply(smmu, &walk, NULL));
    NOTE("walk_supply done", api->walk_supply(smmu, &walk, iovas));
    NOTE("walk_look done", api->walk_look(smmu, &walk));
    NOTE("walk_drop done", api->walk_drop(smmu, &walk));
    NOTE("walk still done", walk.result.event == 3 && walk.fetch.kind == SMMUFAST_FETCH_NONE);

    good.n = 2;
    good.sid.data = &sid;
    good.ssid = (smmufast_column){ssids, 0};
    good.iova = (smmufast_column){iovas, 8};
    good.access = (smmufast_column){access, 0};
    good.pa = (smmufast_column){pa, 8};
    batch = good;
    batch.sid.data = NULL;
    NOTE("batch sid", api->translate_batch(smmu, &batch));
    batch = good;
    batch.ssid.data = NULL;
    NOTE("batch ssid", api->translate_batch(smmu, &batch));
    batch = good;
    batch.iova.data = NULL;
    NOTE("batch iova", api->translate_batch(smmu, &batch));
    batch = good;
    batch.access.data = NULL;
    NOTE("batch access", api->translate_batch(smmu, &batch));
    batch = good;
    batch.ssid.stride = 4;
    NOTE("batch ssid value", api->translate_batch(smmu, &batch));
    batch = good;
    batch.access.stride = 1;
    NOTE("batch access value", api->translate_batch(smmu, &batch));
    batch = good;
    batch.size = offsetof(smmufast_batch, pa) - 1;
    NOTE("batch size", api->translate_batch(smmu, &batch));
    memset(&newer, 0, sizeof newer);
    newer.batch = good;
    newer.batch.size = sizeof newer;
    newer.more[1].data = pa;
    NOTE("batch newer column", api->translate_batch(smmu, &newer.batch));
    old.n = 2;
    for (int i = 0; i < 16; i++)
        old.column[i] = (&good.sid)[i];
    memcpy(&newer, &old, sizeof old);
    NOTE("batch of ABI 2", api->translate_batch(smmu, &newer.batch));
    NOTE("batch untouched", pa[0] == 7 && pa[1] == 7);
    batch = good;
    batch.n = 0;
    NOTE("batch empty", api->translate_batch(smmu, &batch));
    NOTE("batch untouched when empty", pa[0] == 7 && pa[1] == 7);
    memset(&newer, 0, sizeof newer);
    newer.batch = good;
    newer.batch.size = sizeof newer;
    NOTE("batch newer", api->translate_batch(smmu, &newer.batch));
    NOTE("batch written", pa[0] != 7);
    pa[0] = 7;
    batch = good;
    batch.size = offsetof(smmufast_batch, action);
    batch.event.data = iovas; /* beyond its size: not wanted */
    NOTE("batch older", api->translate_batch(smmu, &batch));
    NOTE("batch of the size", pa[0] != 7 && iovas[0] == 0x1000);
#undef NOTE
    api->release(smmu);
    return found;
}

/* mmio(smmu, offset, size): (status, value); mmio(smmu, offset, size, value): status */
static PyObject *py_mmio(PyObject *module, PyObject *args)
{
    PyObject *object, *given = NULL;
    unsigned long long offset, word = 0;
    unsigned int size;
    uint64_t value = 0x5A;
    int status;
    (void)module;
    if (!PyArg_ParseTuple(args, "OKI|O", &object, &offset, &size, &given))
        return NULL;
    if (given != NULL) {
        word = PyLong_AsUnsignedLongLong(given);
        if (PyErr_Occurred())
            return NULL;
    }
    smmufast_smmu *smmu = api->acquire(object);
    if (smmu == NULL)
        return NULL;
    if (given == NULL) { /* with the lock */
        status = api->read(smmu, offset, size, &value);
    } else {             /* without */
        Py_BEGIN_ALLOW_THREADS
        status = api->write(smmu, offset, size, word);
        Py_END_ALLOW_THREADS
    }
    api->release(smmu);
    if (given != NULL)
        return PyLong_FromLong(status);
    return Py_BuildValue("(iK)", status, (unsigned long long)value);
}

static PyObject *py_version(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return Py_BuildValue("(III)", api->abi, api->size, (unsigned int)sizeof(smmufast_api));
}

static PyMethodDef methods[] = {
    {"translate", py_translate, METH_VARARGS, NULL},
    {"ats", py_ats, METH_VARARGS, NULL},
    {"told", py_told, METH_VARARGS, NULL},
    {"translate_held", py_translate_held, METH_VARARGS, NULL},
    {"walk", py_walk, METH_VARARGS, NULL},
    {"step", py_step, METH_VARARGS, NULL},
    {"fetch_of", py_fetch_of, METH_O, NULL},
    {"result_of", py_result_of, METH_O, NULL},
    {"sizes", py_sizes, METH_NOARGS, NULL},
    {"batch", py_batch, METH_VARARGS, NULL},
    {"race", py_race, METH_VARARGS, NULL},
    {"host", py_host, METH_VARARGS, NULL},
    {"reads", py_reads, METH_O, NULL},
    {"hold", py_hold, METH_O, NULL},
    {"misuse", py_misuse, METH_O, NULL},
    {"mmio", py_mmio, METH_VARARGS, NULL},
    {"version", py_version, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "plain_consumer", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_plain_consumer(void)
{
    api = PyCapsule_Import(SMMUFAST_CAPSULE, 0);
    if (api == NULL)
        return NULL;
    if (api->abi != SMMUFAST_ABI) {
        PyErr_SetString(PyExc_ImportError, "smmufast has another ABI");
        return NULL;
    }
    return PyModule_Create(&definition);
}
