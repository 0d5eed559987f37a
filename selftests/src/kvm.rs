// SPDX-License-Identifier: GPL-2.0

//! A virtual machine of KVM: a second MMU beside the process's own, which follows it by an MMU
//! notifier. Its guest has two instructions, which read and write the first byte of a page.

#![allow(unsafe_code)]

use std::io;
use std::path::Path;

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::check::{Fail, OrFail, Outcome};
use crate::memory::{Buffer, PAGE};

/// Guest physical addresses of the code and of the memory.
const CODE: u64 = 0x1000;
const MEMORY: u64 = 4 << 20;
/// `mov [0], al; hlt` and, after it, `mov al, [0]; hlt`, of 16 bits.
const CODE_WORD: u64 = u64::from_le_bytes([0xa2, 0, 0, 0xf4, 0xa0, 0, 0, 0xf4]);
const WRITE: u64 = CODE;
const READ: u64 = CODE + 4;
/// Always set in the flags of a processor.
const RFLAGS: u64 = 2;

/// The slots of the code and of the memory.
const CODE_SLOT: u32 = 0;
const MEMORY_SLOT: u32 = 1;

/// A virtual machine with one processor.
pub struct Guest {
    vcpu: VcpuFd,
    vm: VmFd,
    _code: Buffer,
}

impl Guest {
    /// A guest without memory but for its code. Skips the test where KVM does not work.
    pub fn new() -> Outcome<Self> {
        if !Path::new("/dev/kvm").exists() {
            let none = "no /dev/kvm: this machine's processor has no SVM";
            return Err(Fail::Skip(none.into()));
        }
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm());
        let vm = vm.map_err(io::Error::from).or_fail("KVM_CREATE_VM")?;
        let code = Buffer::anon(1)?;
        code.set(0, 0, CODE_WORD);
        let vcpu = vm.create_vcpu(0).map_err(io::Error::from);
        let vcpu = vcpu.or_fail("KVM_CREATE_VCPU")?;
        let guest = Self {
            vcpu,
            vm,
            _code: code,
        };
        guest
            .set_slot(CODE_SLOT, CODE, &guest._code, PAGE)
            .or_fail("KVM_SET_USER_MEMORY_REGION")?;
        Ok(guest)
    }

    fn set_slot(&self, slot: u32, guest: u64, buf: &Buffer, size: usize) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: guest,
            // CAST: usize has 64 bits here.
            memory_size: size as u64,
            userspace_addr: buf.at(0),
        };
        // SAFETY: Anybody may change the memory of a `Buffer`, by its invariants, and so may the guest.
        // What replaces it after its end is out of the guest's reach: KVM looks the address up each
        // time, and the guest accesses its memory only when a test asks for it.
        unsafe { self.vm.set_user_memory_region(region) }?;
        Ok(())
    }

    /// Makes all of `buf` the guest's memory.
    pub fn map(&self, buf: &Buffer) -> Outcome {
        self.set_slot(MEMORY_SLOT, MEMORY, buf, buf.pages() * PAGE)
            .or_fail("KVM_SET_USER_MEMORY_REGION")
    }

    /// Takes the guest's memory away.
    pub fn unmap(&self, buf: &Buffer) -> Outcome {
        self.set_slot(MEMORY_SLOT, MEMORY, buf, 0)
            .or_fail("KVM_SET_USER_MEMORY_REGION")
    }

    /// Runs the instruction at `rip` for a page, with `rax`. Returns `rax`.
    fn run(&mut self, rip: u64, page: usize, rax: u64) -> io::Result<u64> {
        let mut sregs = self.vcpu.get_sregs()?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        // CAST: usize has 64 bits here.
        sregs.ds.base = MEMORY + (page * PAGE) as u64;
        self.vcpu.set_sregs(&sregs)?;
        let regs = kvm_regs {
            rip,
            rax,
            rflags: RFLAGS,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs)?;
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(self.vcpu.get_regs()?.rax),
                Ok(exit) => return Err(io::Error::other(format!("KVM_RUN: {exit:?}"))),
                Err(err) if err.errno() == libc::EINTR => {}
                Err(err) => return Err(err.into()),
            }
        }
    }

    /// The first byte of a page, as the guest reads it.
    pub fn read(&mut self, page: usize) -> io::Result<u8> {
        Ok(self.run(READ, page, 0)?.to_le_bytes()[0])
    }

    /// The guest writes the first byte of a page.
    pub fn write(&mut self, page: usize, value: u8) -> io::Result<()> {
        self.run(WRITE, page, value.into()).map(drop)
    }
}
