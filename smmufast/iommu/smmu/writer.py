"""Changes an STE or a CD while an SMMU may read it, with few stores and CMD_SYNCs (F44).

The used bits of an STE and a CD are those of IHI 0070 5.2 and 5.4 that its other fields make the
SMMU read.  How few steps an update takes is not architectural: it follows what Linux does.
"""

from smmufast._driver.ring import EntryWriter, Update, cd_used, ste_used

__all__ = ["EntryWriter", "Update", "cd_used", "ste_used"]
