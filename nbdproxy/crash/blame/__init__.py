"""Who lost a file, byte range by byte range: replay, file histories, the audit of a store."""
