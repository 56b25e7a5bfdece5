//! Writing files so that a reader sees the old content or the new, never a part.

use crate::error::{Error, Result};
use std::io::Write;
use std::path::Path;

/// Writes `text` to stdout. A reader that has gone, as `head` does, is not an error.
///
/// # Errors
/// [`Code::WriteFailed`](crate::error::Code::WriteFailed) where stdout cannot be written for another reason.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::write("stdout", &e)),
        _ => Ok(()),
    }
}

/// Writes `bytes` to `path` through a temporary file in the same folder that is synced and then renamed over it.
/// An existing file keeps its permissions; a new one gets those a plain creation would give, as far as the
/// platform's default for readable files goes (0644).
///
/// # Errors
/// [`Code::WriteFailed`](crate::error::Code::WriteFailed), or [`Code::Limit`](crate::error::Code::Limit) when the
/// disk is full; the old file is then untouched and nothing is left behind.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed = |source: &std::io::Error| Error::write(path.display().to_string(), source);
    let mut builder = tempfile::Builder::new();
    builder.prefix(".qcompile-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(path).map_or(0o644, |old| old.permissions().mode() & 0o777);
        builder.permissions(std::fs::Permissions::from_mode(mode));
    }
    let mut file = builder.tempfile_in(folder_of(path)).map_err(|e| failed(&without_path(&e)))?;
    file.write_all(bytes).map_err(|e| failed(&e))?;
    file.as_file().sync_all().map_err(|e| failed(&e))?;
    file.persist(path).map_err(|e| failed(&e.error))?;
    Ok(())
}

/// Refuses, before the work is done, a path that could not be written in the end.
///
/// # Errors
/// As [`write_atomically`].
pub fn check_writable(path: &Path) -> Result<()> {
    let failed = |source: &std::io::Error| Error::write(path.display().to_string(), source);
    if path.is_dir() {
        return Err(failed(&std::io::Error::from(std::io::ErrorKind::IsADirectory)));
    }
    // Only a file that is made shows that one can be made.
    let probe = tempfile::Builder::new().prefix(".qcompile-").tempfile_in(folder_of(path));
    probe.map(|_| ()).map_err(|e| failed(&without_path(&e)))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The system's error without the temporary file's name, which says nothing to anybody and is another every time.
fn without_path(error: &std::io::Error) -> std::io::Error {
    let text = error.to_string();
    let plain = text.split_once(" at path \"").map_or(text.as_str(), |(before, _)| before);
    std::io::Error::new(error.kind(), plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn replaces_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        // A folder cannot be replaced by a file.
        let busy = folder.path().join("busy");
        std::fs::create_dir_all(busy.join("x")).unwrap();
        assert_eq!(write_atomically(&busy, b"x").unwrap_err().code(), Code::WriteFailed);
        for error in [write_atomically, |path: &Path, _: &[u8]| check_writable(path)]
            .map(|write| write(&folder.path().join("none/a.bin"), b"x").unwrap_err())
        {
            assert!(!error.cause().contains("qcompile-"), "{error}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
