//! Builds the shim, and lets the tests find libtorch where it was when they were built.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=shim/ops.cpp");
    for name in ["DEP_TCH_LIBTORCH_LIB", "LIBTORCH_INCLUDE", "LIBTORCH_CXX11_ABI"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let Ok(folder) = std::env::var("DEP_TCH_LIBTORCH_LIB") else {
        panic!("torch-sys does not say where libtorch is");
    };
    println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    // as torch-sys has it
    let include = match std::env::var("LIBTORCH_INCLUDE") {
        Ok(given) => Path::new(&given).join("include"),
        Err(_) => Path::new(&folder).with_file_name("include"),
    };
    let abi = std::env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".into());
    assert!(include.join("ATen").is_dir(), "{} has not the headers of libtorch", include.display());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .include(include)
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .file("shim/ops.cpp")
        .compile("learn-torch");
}
