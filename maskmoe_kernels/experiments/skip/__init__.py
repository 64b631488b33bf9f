"""Skip prediction in music sessions (section 4.3), on real or on generated sessions."""
