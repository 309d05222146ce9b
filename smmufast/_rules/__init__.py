"""Rules: one file for each chapter, of small pure functions on values that were fetched.

`config.pxd`: StreamID, STE, SubstreamID, CD (IHI 0070 chapters 3 and 5).  `vmsa.pxd`: page tables
of both stages (DDI 0487 D8).  `command.pxd`: which commands are legal (IHI 0070 chapter 4).
`scope.pxd`: what cached entries are tagged with, and which of them TLBI and CFGI commands hit
(3.17, 4.3, 4.4).  They import facts alone; what loops over memory, caches or requests is in
`smmufast._engine`.
"""
