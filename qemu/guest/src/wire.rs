// SPDX-License-Identifier: GPL-2.0
//! The status stream from guest to host, over virtio-serial and separate from the console.
//!
//! One message is one line, `SEQ CRC KIND REST`. Sequence number and checksum make a lost, torn or
//! foreign line visible. A stream that does not end after [`Message::Done`] is cut, and a cut
//! stream is never a pass.

use std::fmt;

/// Name of the virtio-serial port, as QEMU's `name=` property and the guest's sysfs have it.
pub const PORT_NAME: &str = "org.zdmirror.status";

/// One message of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The guest is up. Has the kernel release and `/proc/sys/kernel/tainted` at that time.
    Hello {
        /// `uname -r`.
        release: String,
        /// The taint mask before the first test.
        taint: u64,
    },
    /// A suite begins.
    SuiteStart(String),
    /// One test of the running suite begins in a process of its own.
    TestStart(String),
    /// One raw line of (K)TAP of the running suite or test.
    Ktap(String),
    /// The process of that test has ended; `None` means by itself with status 0.
    TestEnd(String, Option<String>),
    /// The suite has ended; `None` means in order.
    SuiteEnd(String, Option<String>),
    /// The taint mask after the last test.
    Taint(u64),
    /// Nothing follows; the guest powers off now.
    Done,
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello { release, taint } => write!(f, "hello {taint} {release}"),
            Self::SuiteStart(name) => write!(f, "suite-start {name}"),
            Self::TestStart(name) => write!(f, "test-start {name}"),
            Self::Ktap(line) => write!(f, "ktap {line}"),
            Self::TestEnd(name, why) => {
                write!(f, "test-end {name} {}", why.as_deref().unwrap_or("ok"))
            }
            Self::SuiteEnd(name, why) => {
                write!(f, "suite-end {name} {}", why.as_deref().unwrap_or("ok"))
            }
            Self::Taint(mask) => write!(f, "taint {mask}"),
            Self::Done => f.write_str("done"),
        }
    }
}

impl Message {
    fn parse(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_once(' ').unwrap_or((text, ""));
        let ended = |rest: &str| {
            let (name, why) = rest.split_once(' ')?;
            Some((name.to_owned(), (why != "ok").then(|| why.to_owned())))
        };
        Some(match kind {
            "hello" => {
                let (taint, release) = rest.split_once(' ')?;
                Self::Hello { release: release.to_owned(), taint: taint.parse().ok()? }
            }
            "suite-start" => Self::SuiteStart(rest.to_owned()),
            "test-start" => Self::TestStart(rest.to_owned()),
            "ktap" => Self::Ktap(rest.to_owned()),
            "test-end" => ended(rest).map(|(n, w)| Self::TestEnd(n, w))?,
            "suite-end" => ended(rest).map(|(n, w)| Self::SuiteEnd(n, w))?,
            "taint" => Self::Taint(rest.parse().ok()?),
            "done" if rest.is_empty() => Self::Done,
            _ => return None,
        })
    }
}

fn checksum(seq: u64, payload: &str) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    hash.update(&seq.to_le_bytes());
    hash.update(payload.as_bytes());
    hash.finalize()
}

/// Turns messages into lines.
#[derive(Debug, Default)]
pub struct Encoder {
    seq: u64,
}

impl Encoder {
    /// Encodes one message as one line, newline included.
    pub fn encode(&mut self, message: &Message) -> String {
        // A line is a message: replace line breaks in the payload.
        let payload: String = message
            .to_string()
            .chars()
            .map(|c| if c.is_control() && c != '\t' { ' ' } else { c })
            .collect();
        let seq = self.seq;
        self.seq += 1;
        format!("{seq} {:08x} {payload}\n", checksum(seq, &payload))
    }
}

/// Turns lines into messages. Remembers the first damage and then reads no further.
#[derive(Debug, Default)]
pub struct Decoder {
    seq: u64,
    partial: Vec<u8>,
    damage: Option<String>,
}

impl Decoder {
    /// Takes more bytes of the stream and returns the messages that they complete.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Message> {
        let mut out = Vec::new();
        if self.damage.is_some() {
            return out;
        }
        self.partial.extend_from_slice(bytes);
        // Remove the used bytes once, at the end: a test may write hundreds of megabytes.
        let partial = std::mem::take(&mut self.partial);
        let mut rest = partial.as_slice();
        while let Some(end) = rest.iter().position(|&b| b == b'\n') {
            let line = String::from_utf8_lossy(&rest[..end]).into_owned();
            rest = &rest[end + 1..];
            match self.line(&line) {
                Ok(message) => out.push(message),
                Err(why) => {
                    self.damage = Some(why);
                    break;
                }
            }
        }
        self.partial = rest.to_vec();
        out
    }

    fn line(&mut self, line: &str) -> Result<Message, String> {
        let broken = |what: &str| format!("status stream broken ({what}) at {line:?}");
        let mut parts = line.splitn(3, ' ');
        let seq: u64 = parts
            .next()
            .and_then(|s| s.parse().ok())
            .ok_or_else(|| broken("no sequence number"))?;
        let sum = parts
            .next()
            .and_then(|s| u32::from_str_radix(s, 16).ok())
            .ok_or_else(|| broken("no checksum"))?;
        let payload = parts.next().ok_or_else(|| broken("no message"))?;
        if sum != checksum(seq, payload) {
            return Err(broken("wrong checksum"));
        }
        if seq != self.seq {
            return Err(broken(&format!("line {} is lost", self.seq)));
        }
        self.seq += 1;
        Message::parse(payload).ok_or_else(|| broken("unknown message"))
    }

    /// The damage of the stream, a torn last line included. Ask for it at the end of the stream.
    pub fn damage(&self) -> Option<String> {
        if self.damage.is_some() {
            return self.damage.clone();
        }
        (!self.partial.is_empty()).then(|| {
            format!(
                "status stream ends within a line: {:?}",
                String::from_utf8_lossy(&self.partial)
            )
        })
    }
}

/// Decodes a whole stream.
pub fn decode(bytes: &[u8]) -> (Vec<Message>, Option<String>) {
    let mut decoder = Decoder::default();
    let messages = decoder.feed(bytes);
    (messages, decoder.damage())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Message> {
        vec![
            Message::Hello { release: "7.3.4 with spaces".into(), taint: 3 },
            Message::SuiteStart("kunit".into()),
            Message::Ktap("    ok 1 a # SKIP why".into()),
            Message::Ktap(String::new()),
            Message::TestStart("hmm.x".into()),
            Message::TestEnd("hmm.x".into(), Some("exit status 1".into())),
            Message::TestEnd("hmm.y".into(), None),
            Message::SuiteEnd("kunit".into(), None),
            Message::Taint(0x41000),
            Message::Done,
        ]
    }

    fn stream() -> String {
        let mut enc = Encoder::default();
        all().iter().map(|m| enc.encode(m)).collect()
    }

    #[test]
    fn round_trip() {
        assert_eq!(decode(stream().as_bytes()), (all(), None));
    }

    #[test]
    fn byte_by_byte() {
        let mut dec = Decoder::default();
        let got: Vec<_> = stream().bytes().flat_map(|b| dec.feed(&[b])).collect();
        assert_eq!(got, all());
    }

    #[test]
    fn torn_line_is_damage() {
        let text = stream();
        let (messages, damage) = decode(&text.as_bytes()[..text.len() - 3]);
        assert_eq!(messages.len(), all().len() - 1);
        assert!(damage.is_some_and(|d| d.contains("ends within a line")));
    }

    #[test]
    fn lost_line_is_damage() {
        let text = stream();
        let kept: String = text.lines().enumerate().filter(|(i, _)| *i != 2).fold(
            String::new(),
            |mut all, (_, line)| {
                all.push_str(line);
                all.push('\n');
                all
            },
        );
        let (messages, damage) = decode(kept.as_bytes());
        assert_eq!(messages.len(), 2);
        assert!(damage.is_some_and(|d| d.contains("line 2 is lost")));
    }

    #[test]
    fn changed_byte_is_damage() {
        let text = stream().replace("ok 1 a", "ok 1 b");
        assert!(decode(text.as_bytes()).1.is_some_and(|d| d.contains("checksum")));
    }

    #[test]
    fn newline_in_a_payload_does_not_make_two_lines() {
        let mut enc = Encoder::default();
        let line = enc.encode(&Message::Ktap("a\nb\rc".into()));
        assert_eq!(decode(line.as_bytes()).0, [Message::Ktap("a b c".into())]);
    }

    #[test]
    fn a_flood_is_read_in_linear_time() {
        let mut enc = Encoder::default();
        let line = "# expected 1, found 0; ".repeat(4);
        let text: String = (0..200_000).map(|_| enc.encode(&Message::Ktap(line.clone()))).collect();
        let start = std::time::Instant::now();
        assert_eq!(decode(text.as_bytes()).0.len(), 200_000);
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "{:?}", start.elapsed());
    }
}
