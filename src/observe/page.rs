//! The page at `/`: one document with its style and its script inside, which asks `/status` and shows it.

use std::sync::LazyLock;

use axum::http::header;
use axum::response::IntoResponse;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

/// The script, in the order in which its parts need each other.
const SCRIPT: &str = concat!(
    "\"use strict\";\n",
    include_str!("page/words.js"),
    include_str!("page/draw.js"),
    include_str!("page/chart.js"),
    include_str!("page/regions.js"),
    include_str!("page/sections.js"),
    include_str!("page/live.js"),
);

const STYLE: &str = include_str!("page/page.css");

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    include_str!("page/page.html")
        .replace("{{css}}", STYLE)
        .replace("{{js}}", SCRIPT)
});

/// What the page may do: run its own script, use its own style, ask its own server. Named by their digests,
/// no other script or style runs, wherever it may come from.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let digest = |text: &str| STANDARD.encode(Sha256::digest(text.as_bytes()));
    format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        digest(SCRIPT),
        digest(STYLE)
    )
});

/// The whole document.
pub fn document() -> &'static str {
    &DOCUMENT
}

/// Answers the page.
pub async fn page() -> impl IntoResponse {
    (
        [
            (header::CONTENT_TYPE, "text/html; charset=utf-8"),
            (header::CACHE_CONTROL, "no-store"),
            (header::CONTENT_SECURITY_POLICY, POLICY.as_str()),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
        ],
        document(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The most that the document may weigh: it is loaded over a phone's network.
    const BYTES_MAX: usize = 150_000;

    #[test]
    fn it_is_one_small_document() {
        assert!(document().len() < BYTES_MAX, "{} bytes", document().len());
        assert!(!document().contains("{{"), "a part is missing");
        assert_eq!(document().matches("</script>").count(), 1);
        assert_eq!(document().matches("</style>").count(), 1);
    }

    #[test]
    fn it_loads_nothing_from_elsewhere() {
        // The name of a drawing's language is no address that is asked.
        let text = document().replace("http://www.w3.org/2000/svg", "");
        for way_out in ["http:", "https:", "//cdn", "@import", "url(/", "src="] {
            assert!(!text.contains(way_out), "{way_out}");
        }
    }

    #[test]
    fn what_comes_from_outside_is_text_alone() {
        for way_in in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "DOMParser",
            "style=",
            "srcdoc",
        ] {
            assert!(!document().contains(way_in), "{way_in}");
        }
    }

    /// Every element that the script looks for is there.
    #[test]
    fn the_script_knows_its_document() {
        let html = include_str!("page/page.html");
        for part in SCRIPT.split("byId(\"").skip(1) {
            let (id, _) = part.split_once('"').unwrap();
            assert!(html.contains(&format!("id=\"{id}\"")), "{id}");
        }
    }
}
