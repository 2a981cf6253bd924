#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>

enum { MAX_WORKERS = 255, SPINS = 2000 };

/* The job at hand. A worker enters by `inside`, looks whether the job is still open, takes pieces, and leaves. */
static struct {
    work do_items;
    void *job;
    int64_t count, grain;
    atomic_int_fast64_t next;
    atomic_int inside, seats;
    atomic_bool is_open;
    atomic_uint turn;
} now;

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t bed = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t call = PTHREAD_COND_INITIALIZER;
static atomic_int sleepers;
static int num_workers;

static void take_pieces(void) {
    for (;;) {
        int64_t first = atomic_fetch_add(&now.next, now.grain);
        if (first >= now.count) return;
        int64_t last = first + now.grain;
        now.do_items(now.job, first, last < now.count ? last : now.count);
    }
}

/* Waits a while for another turn by giving way to others, then asleep. */
static unsigned await_turn(unsigned seen) {
    for (int i = 0; i < SPINS; i++) {
        unsigned turn = atomic_load(&now.turn);
        if (turn != seen) return turn;
        sched_yield();
    }
    pthread_mutex_lock(&bed);
    atomic_fetch_add(&sleepers, 1);
    unsigned turn;
    while ((turn = atomic_load(&now.turn)) == seen) pthread_cond_wait(&call, &bed);
    atomic_fetch_sub(&sleepers, 1);
    pthread_mutex_unlock(&bed);
    return turn;
}

static void *run_worker(void *first_turn) {
    unsigned seen = (unsigned)(uintptr_t)first_turn;
    for (;;) {
        seen = await_turn(seen);
        atomic_fetch_add(&now.inside, 1);
        if (atomic_load(&now.is_open) && atomic_fetch_sub(&now.seats, 1) > 0) take_pieces();
        atomic_fetch_sub(&now.inside, 1);
    }
    return NULL;
}

/* Threads do not survive a fork: a child starts with none. */
static void forget_workers(void) {
    num_workers = 0;
    atomic_store(&now.inside, 0);
    atomic_store(&sleepers, 0);
    pthread_mutex_init(&owner, NULL);
    pthread_mutex_init(&bed, NULL);
    pthread_cond_init(&call, NULL);
}

static void hire(int wanted) {
    static bool watches_forks;
    if (!watches_forks) watches_forks = pthread_atfork(NULL, NULL, forget_workers) == 0;
    if (wanted > MAX_WORKERS) wanted = MAX_WORKERS;
    for (; num_workers < wanted; num_workers++) {
        pthread_t thread;
        void *turn = (void *)(uintptr_t)atomic_load(&now.turn);
        if (pthread_create(&thread, NULL, run_worker, turn) != 0) return; /* fewer do the same work */
        pthread_detach(thread);
    }
}

void share(work do_items, void *job, int64_t count, int64_t grain, int threads) {
    /* Whoever finds the workers busy does its job alone: an adapter that is being tried must not wait for a step. */
    if (threads <= 1 || count <= grain || pthread_mutex_trylock(&owner) != 0) {
        do_items(job, 0, count);
        return;
    }
    hire(threads - 1);
    now.do_items = do_items;
    now.job = job;
    now.count = count;
    now.grain = grain;
    atomic_store(&now.next, 0);
    atomic_store(&now.seats, threads - 1);
    atomic_store(&now.is_open, true);
    atomic_fetch_add(&now.turn, 1);
    if (atomic_load(&sleepers) > 0) {
        pthread_mutex_lock(&bed);
        pthread_cond_broadcast(&call);
        pthread_mutex_unlock(&bed);
    }
    take_pieces();
    atomic_store(&now.is_open, false);
    for (int spins = 0; atomic_load(&now.inside) > 0; spins++)
        if (spins > 200) sched_yield();
    pthread_mutex_unlock(&owner);
}
