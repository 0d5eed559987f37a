/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * zdmirror's own ioctls, next to those of the kernel's lib/test_hmm_uapi.h on the
 * same device nodes (/dev/hmm_dmirrorN).
 *
 * Structures are versioned by their size, which is part of the ioctl number: a
 * shorter structure of an older user space is read as if followed by zeroes, and
 * only as much is written back; bytes that the module does not know must be zero
 * (-E2BIG otherwise).
 */
#ifndef _UAPI_ZDMIRROR_H
#define _UAPI_ZDMIRROR_H

#include <linux/types.h>
#include <linux/ioctl.h>

/**
 * struct zdm_violation - one broken invariant
 * @invariant:	number of the invariant, 4 for I4
 * @check:	which of the invariant's conditions, enum zdm_check
 * @pfn:	page frame number of the (head) page
 * @expected:	value that the condition asks for
 * @found:	value that was there
 * @order:	order of the folio
 * @type:	enum memory_type of the pagemap, as in include/linux/memremap.h; 0 for system
 *		memory
 * @last_time:	time of the page's last transition, in nanoseconds of the kernel log's clock
 * @last_event:	what it was, enum zdm_event
 * @last_pid:	task that made it, or that an interrupt met
 * @last_order:	order of the folio then
 * @reserved:	zero
 *
 * From @last_time on a record is written only where @record_size of struct zdm_audit asks
 * for it.
 */
struct zdm_violation {
	__u32 invariant;
	__u32 check;
	__u64 pfn;
	__u64 expected;
	__u64 found;
	__u32 order;
	__u32 type;
	__u64 last_time;
	__u32 last_event;
	__u32 last_pid;
	__u32 last_order;
	__u32 reserved;
};

/* What the ledger knows of a page: the last thing that happened to it. */
enum zdm_event {
	ZDM_EVENT_NONE		= 0,	/* no page of a device, or no ledger is kept */
	ZDM_EVENT_BORN		= 1,	/* its memory was registered */
	ZDM_EVENT_HANDED_OUT	= 2,	/* it was given to a migration */
	ZDM_EVENT_SETTLED	= 3,	/* the migration to it is done */
	ZDM_EVENT_SPLIT		= 4,	/* the large folio that it was part of was split */
	ZDM_EVENT_FREED		= 5,	/* the last reference on it was dropped */
	ZDM_EVENT_SET_ASIDE	= 6,	/* it was not fit to be handed out */
};

enum zdm_check {
	ZDM_CHECK_REFCOUNT		= 1,	/* reference count */
	ZDM_CHECK_MAPCOUNT		= 2,	/* mapping count */
	ZDM_CHECK_LOCKED		= 3,	/* PG_locked */
	ZDM_CHECK_MAPPING		= 4,	/* folio->mapping */
	ZDM_CHECK_ORDER			= 5,	/* folio order */
	ZDM_CHECK_STATE			= 6,	/* allocator's idea: free (0), in use (1) */
	ZDM_CHECK_ANON_EXCLUSIVE	= 7,	/* PG_anon_exclusive */
	ZDM_CHECK_MEMCG			= 8,	/* memory cgroup still charged */
	ZDM_CHECK_LRU			= 9,	/* PG_lru */
	ZDM_CHECK_STUCK			= 10,	/* page could not be evicted */
	ZDM_CHECK_TAIL			= 11,	/* page is the tail of a large folio */
	ZDM_CHECK_PAGEMAP		= 12,	/* references of the pagemap; pfn is its first */
	ZDM_CHECK_FLAGS			= 13,	/* page->flags without those that are explained */
	ZDM_CHECK_PRIVATE		= 14,	/* page->private */
	ZDM_CHECK_INDEX			= 15,	/* page->index */
	ZDM_CHECK_TYPE			= 16,	/* page->page_type, or the mapping count there */
	ZDM_CHECK_ENTIRE		= 17,	/* entries that map all of a large folio */
	ZDM_CHECK_PINS			= 18,	/* pin count of a large folio */
	ZDM_CHECK_DEFERRED		= 19,	/* on a list of folios to be split */
	ZDM_CHECK_DATA			= 20,	/* page->zone_device_data */
	ZDM_CHECK_PAGES_MAPPED		= 21,	/* mapped pages of a large folio */
	ZDM_CHECK_PAGES			= 22,	/* number of pages of a large folio */
	ZDM_CHECK_ENTRIES		= 23,	/* page table entries; found: mapping count */
	ZDM_CHECK_FRAME			= 24,	/* the CPU's page, or 0; found: the device's */
	ZDM_CHECK_RIGHTS		= 25,	/* 1 read, 3 write: the CPU's; found: device's */
	ZDM_CHECK_MARKS			= 26,	/* of an entry; pfn: number of the page there */
};

/**
 * struct zdm_fault - let the device fault a range in, without copying data
 * @addr:	in: first user address, on a page boundary
 * @npages:	in: pages from there on
 * @flags:	in: ZDM_FAULT_WRITE, or 0 for a fault for reading
 * @reserved:	must be zero
 * @mapped:	out: pages that the device maps now, all of them unless the call fails
 *
 * Afterwards the device's page table holds the range, until the next invalidation.
 * -EFAULT where there is nothing to map, -EPERM for a write to what is read-only,
 * -EBUSY when invalidations keep coming for a second.
 */
struct zdm_fault {
	__u64 addr;
	__u64 npages;
	__u32 flags;
	__u32 reserved;
	__u64 mapped;
};

#define ZDM_FAULT_WRITE		0x1

/**
 * struct zdm_fault_around - what a CPU fault on device memory may bring back
 * @pages:	in: most pages, up to ZDM_FAULT_AROUND_MAX, 0 or 1 for the folio of the fault
 *		only; out: what was set before
 * @flags:	must be zero
 *
 * For faults of any task on small folios of PRIVATE memory that this file has moved to
 * the device. A file begins with the value of the module parameter fault_around.
 *
 * A fault that follows on what another one brought, upwards or downwards, brings a window
 * of 16 pages, and each further one twice as many while the CPU uses what comes. A window
 * lies within one area and one page table. MADV_SEQUENTIAL lets the first fault bring the
 * largest window; with MADV_RANDOM there is none. Only pages that this file has moved come
 * along. Places without a page stay so, and pages that are held or locked are left where
 * they are. Small folios come back as small ones; a large folio moves in one piece by
 * itself, as ever.
 */
struct zdm_fault_around {
	__u32 pages;
	__u32 flags;
};

#define ZDM_FAULT_AROUND_MAX	512

/**
 * struct zdm_audit - scan every pagemap of the device
 * @pages:	out: struct pages scanned
 * @free:	out: pages that the allocator holds
 * @used:	out: pages handed out
 * @found:	out: violations that this scan found
 * @total:	out: violations on this device since the module was loaded
 * @records:	in: user pointer to an array of struct zdm_violation
 * @nr_records:	in: room in that array; out: records written, newest last. At
 *		most ZDM_AUDIT_MAX_RECORDS are kept.
 * @flags:	in: ZDM_AUDIT_*
 * @record_size: in: sizeof(struct zdm_violation), or 0 for ZDM_VIOLATION_SIZE_VER0; another
 *		size is as that of an older or newer structure
 * @reserved:	must be zero
 *
 * Without ZDM_AUDIT_QUIET a locked page is taken to be in motion, and references on
 * COHERENT and GENERIC pages beyond their mappings are taken to be those of holders
 * that are allowed to hold them. Without CAP_SYS_ADMIN @pfn, @last_pid and
 * addresses in @expected and @found of the records are zero.
 */
struct zdm_audit {
	__u64 pages;
	__u64 free;
	__u64 used;
	__u64 found;
	__u64 total;
	__u64 records;
	__u32 nr_records;
	__u32 flags;
	__u32 record_size;
	__u32 reserved;
};

#define ZDM_VIOLATION_SIZE_VER0	40
#define ZDM_AUDIT_MAX_RECORDS	64
/* Forget the records and the total after they were copied out (CAP_SYS_ADMIN). */
#define ZDM_AUDIT_CLEAR		0x1
/*
 * No scan: read every struct page and nothing else, which is what a scan costs at
 * least. Only @pages is counted (CAP_SYS_ADMIN).
 */
#define ZDM_AUDIT_PASS		0x2
/*
 * The caller promises that nothing migrates, faults or unmaps pages of this device
 * and that no task holds one: every reference counts (CAP_SYS_ADMIN). So it does
 * where the module parameter inject=1 is given.
 */
#define ZDM_AUDIT_QUIET		0x4

/**
 * struct zdm_inject - break one invariant on purpose, to test the oracle
 * @kind:	in: enum zdm_inject_kind
 * @reserved:	must be zero
 * @addr:	in: user address of a page, for the kinds that want one;
 *		physical address for ZDM_INJECT_EXTRA_MAPPING; milliseconds for
 *		ZDM_INJECT_SLOW
 * @pfn:	out: the page that was touched
 *
 * Needs CAP_SYS_ADMIN and the module parameter inject=1, -EPERM otherwise;
 * -ENOENT when @addr maps no page of this device.
 */
struct zdm_inject {
	__u32 kind;
	__u32 reserved;
	__u64 addr;
	__u64 pfn;
};

enum zdm_inject_kind {
	/* Take a reference on the device page at addr and keep it. */
	ZDM_INJECT_EXTRA_GET		= 1,
	/* Drop the reference taken by ZDM_INJECT_EXTRA_GET on this file. */
	ZDM_INJECT_UNDO_GET		= 2,
	/* Give a free page a reference count of one: the old rule. */
	ZDM_INJECT_FREE_PAGE_REF	= 3,
	/* Set it back to zero. */
	ZDM_INJECT_UNDO_FREE_PAGE_REF	= 4,
	/*
	 * Let the allocator return a page that is in use already: the next
	 * migration meets it, reports I2 and takes another page.
	 */
	ZDM_INJECT_ALLOC_TWICE		= 5,
	/* Free a page once more that is free: I4. Nothing is left behind. */
	ZDM_INJECT_DOUBLE_FREE		= 6,
	/* Leave a mapping, or PG_anon_exclusive, on a free page: I5, I2 when it is handed out. */
	ZDM_INJECT_STALE_MAPPING	= 7,
	ZDM_INJECT_STALE_ANON_EXCLUSIVE	= 8,
	/* Take either back. */
	ZDM_INJECT_UNDO_STALE		= 9,
	/* Leak a reference of the pagemap: I6. The module stays loaded while it is. */
	ZDM_INJECT_PAGEMAP_GET		= 10,
	/* Drop it. */
	ZDM_INJECT_PAGEMAP_PUT		= 11,
	/* The next memory that is registered has a page with a reference: I1. */
	ZDM_INJECT_BORN_REF		= 12,
	/*
	 * Keep a reference on the first folio that the next migration to the device moves,
	 * until ZDM_INJECT_UNDO_GET: on where it moved to (I3), or on where it came from,
	 * which then has moved under a holder (I9) and is not freed (I8).
	 */
	ZDM_INJECT_SETTLED_REF		= 13,
	ZDM_INJECT_SOURCE_REF		= 14,
	/* Flip a bit of the data of the device page at addr (I10); again, to flip it back. */
	ZDM_INJECT_CORRUPT		= 15,
	/*
	 * Count a mapping more on the page at the physical address addr, of any driver's
	 * pagemap: the survey of pagemaps must find it. -EBUSY on a page of a large folio.
	 */
	ZDM_INJECT_EXTRA_MAPPING	= 16,
	/* Take it back. Closing the file does so, too. */
	ZDM_INJECT_UNDO_MAPPING		= 17,
	/*
	 * Evictions from this device take addr milliseconds more (0 to 1000) while their
	 * pages are unmapped, as if the device copied slowly, until this file is closed:
	 * what other tasks do meanwhile meets migration entries.
	 */
	ZDM_INJECT_SLOW			= 18,
	/*
	 * The next invalidation of the page at addr lasts until ZDM_INJECT_LET_GO on this
	 * file, but for a second at most, as if another mirror of the process were slow:
	 * others can change the page before the change that was announced. -EBUSY while one
	 * is held or asked for. What core mm does not let sleep is not held.
	 */
	ZDM_INJECT_HOLD			= 19,
	/* pfn is 1 while an invalidation is held, else 0. */
	ZDM_INJECT_IS_HELD		= 20,
	/* pfn is 1 if one was held. */
	ZDM_INJECT_LET_GO		= 21,
	/*
	 * As ZDM_INJECT_LET_GO, and the next invalidation of the page at addr is held, which
	 * cannot pass in between. -ENOENT if none is held.
	 */
	ZDM_INJECT_GO_ON		= 22,
};

/* Orders that are counted by themselves; no page table entry of a device maps a larger one. */
#define ZDM_STATS_ORDERS	16

/**
 * struct zdm_stats - counters of the device since the module was loaded
 * @allocated:		base pages handed out
 * @freed:		base pages that came back
 * @to_device:		base pages that moved to the device
 * @to_system:		base pages that moved back, for a CPU fault or on request
 * @cpu_faults:		CPU faults on device pages
 * @device_faults:	times that the device had to fault
 * @evicted:		base pages that moved back because a file was closed
 * @failed_alloc:	base pages that there was no memory for
 * @failed_migrate:	base pages that core mm would not move
 * @violations:		broken invariants, as @total of struct zdm_audit
 * @large_to_device:	folios above order 0 that moved to the device in one piece
 * @large_to_system:	folios above order 0 that moved back in one piece
 * @large_fallback:	folios above order 0 that were moved in small ones instead
 * @max_order:		largest order of a device folio that this kernel can migrate;
 *			no counter
 * @exclusive:		base pages that the device got exclusive access to
 * @free_refs:		references that this kernel keeps on a free page of the device's
 *			memory: 0, or 1 for GENERIC memory where the old rule holds; no
 *			counter
 * @around:		base pages that CPU faults brought back besides those that they were
 *			about, see ZDM_FAULT_AROUND
 * @around_hits:	of these, those that the CPU had accessed when a later fault went on
 *			from there, or when the stream of faults was given up for another
 *			one of the same process
 * @around_waste:	of these, those that it had not accessed then
 * @to_device_by_order:	folios that moved to the device in one piece, by their order
 * @to_system_by_order:	folios that moved back in one piece, evicted ones included
 */
struct zdm_stats {
	__u64 allocated;
	__u64 freed;
	__u64 to_device;
	__u64 to_system;
	__u64 cpu_faults;
	__u64 device_faults;
	__u64 evicted;
	__u64 failed_alloc;
	__u64 failed_migrate;
	__u64 violations;
	__u64 large_to_device;
	__u64 large_to_system;
	__u64 large_fallback;
	__u64 max_order;
	__u64 exclusive;
	__u64 free_refs;
	__u64 around;
	__u64 around_hits;
	__u64 around_waste;
	__u64 to_device_by_order[ZDM_STATS_ORDERS];
	__u64 to_system_by_order[ZDM_STATS_ORDERS];
};

/*
 * HMM_DMIRROR_SNAPSHOT of a page of GENERIC memory, next to those of
 * lib/test_hmm_uapi.h; remote is every pagemap but those of this device.
 */
#define ZDM_PROT_DEV_GENERIC_LOCAL	0x60
#define ZDM_PROT_DEV_GENERIC_REMOTE	0x70

/**
 * struct zdm_page - what is known of one page, for ZDM_INSPECT
 * @pfn:	page frame number of the page itself, 0 where there is none, and for callers
 *		without CAP_SYS_ADMIN
 * @refs:	reference count of its folio
 * @mapcount:	page table entries that map the folio, folio_mapcount()
 * @pins:	FOLL_PIN pins of the folio; an estimate (references in units of
 *		GUP_PIN_COUNTING_BIAS) where the folio is small
 * @order:	order of the folio
 * @type:	enum memory_type of the pagemap, 0 for system memory
 * @owner:	enum zdm_owner, whose pagemap it is
 * @flags:	ZDM_PAGE_*
 * @index:	number of the page in its folio
 *
 * The counts are those of one moment. What the ioctl holds itself is not in them.
 */
struct zdm_page {
	__u64 pfn;
	__s32 refs;
	__s32 mapcount;
	__s32 pins;
	__u32 order;
	__u32 type;
	__u32 owner;
	__u32 flags;
	__u32 index;
};

enum zdm_owner {
	ZDM_OWNER_NONE		= 0,	/* system memory, or a pagemap without an owner */
	ZDM_OWNER_LOCAL		= 1,	/* this device */
	ZDM_OWNER_REMOTE	= 2,	/* another device, or another driver */
};

/* The address maps a page, or there is such a page frame; all is 0 otherwise. */
#define ZDM_PAGE_THERE		0x0001
/*
 * The CPU (or, for PRIVATE memory, the device) may write through the mapping.
 * On kernels with series A the flag is absent while a PTE or PMD of the CPU is
 * clean, even if the CPU may write: hmm_range_fault() reports such a page as
 * read-only, because reclaim may throw it away. The first write sets the flag.
 */
#define ZDM_PAGE_WRITE		0x0002
/* One PMD maps it, one PUD maps it. */
#define ZDM_PAGE_PMD		0x0004
#define ZDM_PAGE_PUD		0x0008
/* Flags of the folio: locked, on an LRU list, anonymous, charged to a memcg. */
#define ZDM_PAGE_LOCKED		0x0010
#define ZDM_PAGE_LRU		0x0020
#define ZDM_PAGE_ANON		0x0040
#define ZDM_PAGE_CHARGED	0x0080
/* folio->mapping is set. */
#define ZDM_PAGE_MAPPING	0x0100
/* PG_anon_exclusive of the page itself. */
#define ZDM_PAGE_ANON_EXCLUSIVE	0x0200
/* It is the page of zeroes, small or huge. */
#define ZDM_PAGE_ZERO		0x0400
/* The address cannot be accessed (poisoned, PROT_NONE, no mapping); no page then. */
#define ZDM_PAGE_ERROR		0x0800
/* The folio names another place than the address: another file, anon_vma or index in it. */
#define ZDM_PAGE_MISPLACED	0x1000

/**
 * struct zdm_inspect - look at pages without touching them
 * @addr:	in: first user address, on a page boundary; with ZDM_INSPECT_PFN the
 *		number of the first page frame
 * @npages:	in: pages from there on, at most ZDM_INSPECT_MAX_PAGES
 * @pages:	in: user pointer to as many struct zdm_page
 * @flags:	in: ZDM_INSPECT_*
 * @reserved:	must be zero
 *
 * By address any memory of the mirrored process can be looked at, DAX included;
 * nothing is faulted in. A PRIVATE page of another device is seen as no page. By
 * page frame number any page of any pagemap can be looked at, free ones included:
 * what is no page of a pagemap is no page here either.
 */
struct zdm_inspect {
	__u64 addr;
	__u64 npages;
	__u64 pages;
	__u32 flags;
	__u32 reserved;
};

/* Look at page frames of ZONE_DEVICE memory of any driver (CAP_SYS_ADMIN). */
#define ZDM_INSPECT_PFN		0x1
#define ZDM_INSPECT_MAX_PAGES	65536

/**
 * struct zdm_pin - hold references on user pages
 * @addr:	in: first user address, on a page boundary
 * @npages:	in: pages from there on
 * @flags:	in: ZDM_PIN_*
 * @id:		out: what ZDM_UNPIN wants
 *
 * All of the pages are held, or none. They are let go by ZDM_UNPIN or when the file
 * is closed. A file holds at most ZDM_PIN_MAX_PAGES in ZDM_PIN_MAX pins, -ENOSPC
 * for more. The pages are those of the calling process.
 */
struct zdm_pin {
	__u64 addr;
	__u64 npages;
	__u32 flags;
	__u32 id;
};

/* For writing: copy-on-write is broken first. */
#define ZDM_PIN_WRITE		0x1
/* get_user_pages() rather than pin_user_pages(); not with ZDM_PIN_LONGTERM. */
#define ZDM_PIN_GET		0x2
/* FOLL_LONGTERM. */
#define ZDM_PIN_LONGTERM	0x4
/* The variant that tries without the mmap lock first, as O_DIRECT does. */
#define ZDM_PIN_FAST		0x8
#define ZDM_PIN_MAX		64
#define ZDM_PIN_MAX_PAGES	65536

/**
 * struct zdm_unpin - let go of what ZDM_PIN holds
 * @id:		in: as ZDM_PIN said; -ENOENT for what this file does not hold
 * @flags:	in: ZDM_UNPIN_DIRTY or 0
 */
struct zdm_unpin {
	__u32 id;
	__u32 flags;
};

/* Mark the pages dirty, for a process that has written to them. */
#define ZDM_UNPIN_DIRTY		0x1

#define ZDM_FAULT	_IOWR('H', 0x40, struct zdm_fault)
#define ZDM_INSPECT	_IOWR('H', 0x41, struct zdm_inspect)
#define ZDM_AUDIT	_IOWR('H', 0x42, struct zdm_audit)
#define ZDM_PIN		_IOWR('H', 0x43, struct zdm_pin)
#define ZDM_UNPIN	_IOW('H', 0x44, struct zdm_unpin)
#define ZDM_INJECT	_IOWR('H', 0x45, struct zdm_inject)
#define ZDM_STATS	_IOR('H', 0x46, struct zdm_stats)
#define ZDM_FAULT_AROUND _IOWR('H', 0x47, struct zdm_fault_around)

#endif /* _UAPI_ZDMIRROR_H */
