// SPDX-License-Identifier: GPL-2.0
//! The page as a real browser draws it, compared with stored pictures. Run it by `make test-page`,
//! which gets the browser and a font. `ZDM_PICTURES=write` stores what was drawn; look at it before.
//!
//! The stored pictures have one pixel for each block of 8 x 8, the mean of the block: a moved or missing
//! part shows, and another version of the browser draws letters differently without effect.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::page;
use crate::recorded::{folder, mutants};

const BROWSER: &str = "chromium-headless-shell";
/// The sides of a block.
const BLOCK: usize = 8;
/// A mean that differs by less is the same.
const SAME: u8 = 20;
/// The number of blocks in a thousand that may differ.
const MAY_DIFFER: usize = 4;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Picture {
    width: usize,
    rgb: Vec<u8>,
}

impl Picture {
    fn read(path: &Path) -> Self {
        let file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut reader = png::Decoder::new(BufReader::new(file)).read_info().unwrap();
        let mut bytes = vec![0; reader.output_buffer_size()];
        let info = reader.next_frame(&mut bytes).unwrap();
        let samples = info.color_type.samples();
        let rgb = bytes[..info.buffer_size()].chunks(samples).flat_map(|p| [p[0], p[1], p[2]]);
        Self { width: info.width as usize, rgb: rgb.collect() }
    }

    fn write(&self, path: &Path) {
        let height = self.rgb.len() / 3 / self.width;
        let (width, height) = (u32::try_from(self.width).unwrap(), u32::try_from(height).unwrap());
        let mut encoder = png::Encoder::new(File::create(path).unwrap(), width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.write_header().unwrap().write_image_data(&self.rgb).unwrap();
    }

    fn pixel(&self, x: usize, y: usize) -> [u8; 3] {
        let at = (y * self.width + x) * 3;
        [self.rgb[at], self.rgb[at + 1], self.rgb[at + 2]]
    }

    /// The means of the blocks.
    fn blocks(&self) -> Self {
        let (columns, rows) = (self.width / BLOCK, self.rgb.len() / 3 / self.width / BLOCK);
        let mut rgb = Vec::with_capacity(columns * rows * 3);
        for (row, column) in (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))) {
            for channel in 0..3 {
                let all = (0..BLOCK * BLOCK).map(|i| {
                    let (x, y) = (column * BLOCK + i % BLOCK, row * BLOCK + i / BLOCK);
                    usize::from(self.pixel(x, y)[channel])
                });
                rgb.push(u8::try_from(all.sum::<usize>() / (BLOCK * BLOCK)).unwrap());
            }
        }
        Self { width: columns, rgb }
    }

    /// The number of blocks in a thousand that differ; all of them if the sizes do.
    fn differs(&self, other: &Self) -> usize {
        if (self.width, self.rgb.len()) != (other.width, other.rgb.len()) {
            return 1000;
        }
        let pairs = self.rgb.chunks(3).zip(other.rgb.chunks(3));
        let differ =
            pairs.filter(|(a, b)| a.iter().zip(*b).any(|(a, b)| a.abs_diff(*b) >= SAME)).count();
        (differ * 1000).div_ceil(self.rgb.len() / 3)
    }
}

/// A browser that knows one family of fonts, whatever this machine has.
struct Browser(TempDir);

impl Browser {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let fonts = format!(
            "<fontconfig><dir>/usr/share/fonts/truetype/dejavu</dir><cachedir>{}</cachedir>\
             <alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>\
             </fontconfig>",
            dir.path().join("fonts").display()
        );
        fs::write(dir.path().join("fonts.conf"), fonts).unwrap();
        Self(dir)
    }

    /// Loads a page. Returns what the browser prints.
    fn load(&self, page: &Path, arguments: &[&str]) -> String {
        let out = Command::new(BROWSER)
            .args(["--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"])
            .arg(format!("--user-data-dir={}", self.0.path().join("profile").display()))
            .args(arguments)
            .arg(format!("file://{}", page.display()))
            .env("FONTCONFIG_FILE", self.0.path().join("fonts.conf"))
            .output()
            .unwrap_or_else(|e| panic!("{BROWSER}: {e}; run make test-page"));
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    fn draw(&self, page: &Path, dark: bool, width: u32, height: u32) -> Picture {
        let shot = self.0.path().join("shot.png");
        // Chromium counts its schemes from dark on.
        let scheme = if dark { 0 } else { 1 };
        let arguments = [
            format!("--blink-settings=preferredColorScheme={scheme}"),
            format!("--window-size={width},{height}"),
            format!("--screenshot={}", shot.display()),
        ];
        self.load(page, &arguments.each_ref().map(String::as_str));
        Picture::read(&shot)
    }
}

/// Compares what was drawn with the stored picture `name`.
fn compare(name: &str, drawn: &Picture) {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/html/pictures");
    let stored = tests.join(format!("{name}.png"));
    if std::env::var("ZDM_PICTURES").is_ok_and(|v| v == "write") {
        fs::create_dir_all(&tests).unwrap();
        drawn.blocks().write(&stored);
    }
    let differs = drawn.blocks().differs(&Picture::read(&stored));
    if differs > MAY_DIFFER {
        let seen = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.png"));
        drawn.write(&seen);
        panic!(
            "{differs} of 1000 blocks differ from {}; what was drawn is {}",
            stored.display(),
            seen.display()
        );
    }
}

/// A page with everything that there is: two kernels side by side, a first failure, benchmarks, seeded
/// bugs. All details are open but the ends of the logs.
fn full(dir: &Path) -> PathBuf {
    let all =
        [folder(dir, "stock", Some("oops.report")), folder(dir, "patched", None), mutants(dir)];
    let out = dir.join("all.html");
    let text = page(&all, &out).replace("<details>", "<details open>");
    let text = text.replace("<details open><summary>Lines", "<details><summary>Lines");
    fs::write(&out, text).unwrap();
    out
}

#[test]
#[ignore = "needs a browser: make test-page"]
fn pages_look_as_before() {
    let dir = TempDir::new().unwrap();
    let browser = Browser::new();
    let page = full(dir.path());
    for (name, dark, width, height) in
        [("light", false, 1120, 4600), ("dark", true, 1120, 4600), ("narrow", false, 480, 6000)]
    {
        compare(name, &browser.draw(&page, dark, width, height));
    }
}

/// The comparison notices a part that is missing.
#[test]
#[ignore = "needs a browser: make test-page"]
fn a_missing_part_is_seen() {
    let dir = TempDir::new().unwrap();
    let browser = Browser::new();
    let whole = full(dir.path());
    let before = browser.draw(&whole, false, 1120, 4600).blocks();
    let text = fs::read_to_string(&whole).unwrap();
    for (what, from, to) in [
        ("a bar of the timeline", "<rect class=\"bad\"", "<g class=\"bad\""),
        ("the mark of the first failure", " class=\"here\"", ""),
        ("a colour", "--good: #1a7f4b", "--good: #7f1a4b"),
        ("the layout of tables", "border-collapse: collapse; width: 100%;", ""),
    ] {
        assert!(text.contains(from), "{what}");
        let page = dir.path().join("spoilt.html");
        fs::write(&page, text.replace(from, to)).unwrap();
        let after = browser.draw(&page, false, 1120, 4600).blocks();
        assert!(before.differs(&after) > 0, "{what} makes no difference");
    }
}

/// On a narrow screen only tables and logs scroll, not the page. The copy of the page has a script that
/// measures it.
#[test]
#[ignore = "needs a browser: make test-page"]
fn a_narrow_page_does_not_scroll_sideways() {
    let dir = TempDir::new().unwrap();
    let browser = Browser::new();
    let page = full(dir.path());
    let script = "<script>document.title = 'wide ' + document.documentElement.scrollWidth + ' of ' + \
                  innerWidth;</script></body>";
    let text = fs::read_to_string(&page).unwrap().replace("</body>", script);
    fs::write(&page, text).unwrap();
    let dom = browser.load(&page, &["--window-size=480,900", "--dump-dom"]);
    let (_, title) = dom.split_once("<title>wide ").unwrap_or_else(|| panic!("{dom}"));
    let (title, _) = title.split_once("</title>").unwrap();
    let (wide, of) = title.split_once(" of ").unwrap();
    assert_eq!(wide, of);
}

#[test]
#[ignore = "needs a browser: make test-page"]
fn the_page_can_be_printed() {
    let dir = TempDir::new().unwrap();
    let browser = Browser::new();
    let (page, pdf) = (full(dir.path()), dir.path().join("page.pdf"));
    browser.load(&page, &["--no-pdf-header-footer", &format!("--print-to-pdf={}", pdf.display())]);
    let bytes = fs::read(pdf).unwrap();
    assert!(bytes.starts_with(b"%PDF-"));
    let text = String::from_utf8_lossy(&bytes);
    let pages = text.matches("/Type /Page\n").count() + text.matches("/Type/Page/").count();
    assert!((2..=12).contains(&pages), "{pages} pages");
}
