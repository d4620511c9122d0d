use super::*;

fn path(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("coordinator.redb")
}

fn turn(fill: impl FnOnce(&mut Turn)) -> Turn {
    let mut turn = Turn::default();
    fill(&mut turn);
    turn
}

#[test]
fn what_was_written_is_there_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let mut state = StateFile::create(&path(&folder)).unwrap();
    state
        .write(turn(|turn| {
            turn.value("clock", &3).unwrap();
            turn.row(7, &"seven").unwrap();
            turn.row(5, &"five").unwrap();
            turn.entry(&"a").unwrap();
            turn.line(&"one").unwrap();
            turn.key("id".into(), vec![1, 2]);
        }))
        .unwrap();
    state
        .write(turn(|turn| {
            turn.value("clock", &4).unwrap();
            turn.row(7, &"seven again").unwrap();
            turn.entry(&"b").unwrap();
            turn.line(&"two").unwrap();
        }))
        .unwrap();
    // what a kill leaves: the file as it is, without anything that closing does
    let killed = folder.path().join("killed.redb");
    std::fs::copy(path(&folder), &killed).unwrap();
    let left = StateFile::open(&killed).unwrap();
    assert_eq!(left.value::<u32>("clock").unwrap(), Some(4));
    assert_eq!(left.value::<u32>("nothing").unwrap(), None);
    assert_eq!(left.rows::<String>().unwrap(), [(5, "five".into()), (7, "seven again".into())]);
    assert_eq!(left.entries::<String>().unwrap(), ["a", "b"]);
    assert_eq!(left.lines::<String>().unwrap(), [(0, "one".into()), (1, "two".into())]);
    assert_eq!(left.keys().unwrap(), [("id".to_owned(), vec![1, 2])]);
    assert_eq!((left.next_entry, left.next_line()), (2, 2));
}

#[test]
fn what_is_forgotten_is_gone_and_numbers_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut state = StateFile::create(&path(&folder)).unwrap();
    let fill = |turn: &mut Turn| {
        turn.row(1, &"one").unwrap();
        turn.row(2, &"two").unwrap();
        turn.entry(&1).unwrap();
        turn.line(&1).unwrap();
        turn.key("old".into(), vec![]);
    };
    state.write(turn(fill)).unwrap();
    state
        .write(turn(|turn| {
            turn.forget_row(1);
            turn.forget_row(9);
            turn.entry(&2).unwrap();
            turn.forget_entries();
            turn.entry(&3).unwrap();
            turn.lines_are_written(1);
            turn.line(&2).unwrap();
            turn.clear_keys();
            turn.key("new".into(), vec![]);
        }))
        .unwrap();
    drop(state);
    let state = StateFile::open(&path(&folder)).unwrap();
    assert_eq!(state.rows::<String>().unwrap(), [(2, "two".into())]);
    assert_eq!(state.entries::<u32>().unwrap(), [3]);
    assert_eq!(state.lines::<u32>().unwrap(), [(1, 2)]);
    assert_eq!(state.keys().unwrap(), [("new".to_owned(), vec![])]);
    assert!(Turn::default().is_empty() && turn(|turn| turn.lines_are_written(9)).is_empty());
    assert!(!turn(Turn::clear_keys).is_empty() && !turn(Turn::forget_entries).is_empty());
    assert!(!turn(|turn| turn.forget_row(1)).is_empty());
}

#[test]
fn a_new_job_does_not_see_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    StateFile::create(&path(&folder)).unwrap().write(turn(|turn| turn.value("clock", &1).unwrap())).unwrap();
    assert_eq!(StateFile::create(&path(&folder)).unwrap().value::<u32>("clock").unwrap(), None);
}

#[test]
fn a_missing_foreign_cut_or_newer_file_is_refused_with_the_way_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = path(&folder);
    assert!(matches!(StateFile::open(&path), Err(StateError::Nothing(_))));
    std::fs::write(&path, "").unwrap();
    assert!(matches!(StateFile::open(&path), Err(StateError::Nothing(_))));
    std::fs::write(&path, "a diary\n".repeat(2000)).unwrap();
    let error = StateFile::open(&path).unwrap_err().to_string();
    assert!(error.contains("coordinator.redb") && error.contains("learn-launch resume"), "{error}");

    let mut state = StateFile::create(&path).unwrap();
    state.write(turn(|turn| turn.value("big", &vec![7_u64; 100_000]).unwrap())).unwrap();
    drop(state);
    let whole = std::fs::read(&path).unwrap();
    for length in [whole.len() / 2, 4096, 100] {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert!(matches!(StateFile::open(&path), Err(StateError::Damaged { .. })), "cut to {length} bytes");
    }

    for other in [FORMAT - 1, FORMAT + 1] {
        let mut state = StateFile::create(&path).unwrap();
        state.write(turn(|turn| turn.value("format", &other).unwrap())).unwrap();
        drop(state);
        assert!(StateFile::open(&path).unwrap_err().to_string().contains(&format!("format {other}")));
    }
}

/// A kill between any two writes of the database leaves the state before or after the turn.
#[test]
fn a_torn_turn_is_whole_or_not_there() {
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Debug)]
    enum Change {
        Length(u64),
        Write(u64, Vec<u8>),
    }

    /// Keeps every change of the file, to play a part of them.
    #[derive(Debug)]
    struct Recorder(PageCache, Arc<Mutex<Vec<Change>>>);

    impl StorageBackend for Recorder {
        fn len(&self) -> Result<u64, io::Error> {
            self.0.len()
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
            self.0.read(offset, out)
        }
        fn set_len(&self, len: u64) -> Result<(), io::Error> {
            self.1.lock().unwrap().push(Change::Length(len));
            self.0.set_len(len)
        }
        fn sync_data(&self) -> Result<(), io::Error> {
            Ok(())
        }
        fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
            self.1.lock().unwrap().push(Change::Write(offset, data.to_vec()));
            self.0.write(offset, data)
        }
    }

    let folder = tempfile::tempdir().unwrap();
    let path = path(&folder);
    let mut state = StateFile::create(&path).unwrap();
    let change = |number: u32| {
        turn(|turn| {
            turn.value("clock", &number).unwrap();
            turn.entry(&number).unwrap();
        })
    };
    (1..=3).for_each(|number| state.write(change(number)).unwrap());
    drop(state);

    let changes = Arc::new(Mutex::new(Vec::new()));
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let backend = Recorder(PageCache(FileBackend::new(file).unwrap()), changes.clone());
    let database = Database::builder().create_with_backend(backend).unwrap();
    let mut state = StateFile { path: path.clone(), database, next_entry: 3, next_line: 0 };
    changes.lock().unwrap().clear();
    let before = std::fs::read(&path).unwrap();
    state.write(change(4)).unwrap();
    let changes = changes.lock().unwrap().clone();
    assert!(changes.len() > 1, "else there is nothing to tear");
    let clocks = (0..=changes.len()).map(|kept| {
        let mut bytes = before.clone();
        for change in &changes[..kept] {
            match change {
                Change::Length(length) => bytes.resize(*length as usize, 0),
                Change::Write(offset, data) => {
                    bytes[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
                }
            }
        }
        let torn = folder.path().join("torn.redb");
        std::fs::write(&torn, bytes).unwrap();
        let left = StateFile::open(&torn).unwrap();
        let clock = left.value::<u32>("clock").unwrap().unwrap();
        assert_eq!(left.entries::<u32>().unwrap(), (1..=clock).collect::<Vec<_>>(), "after {kept} changes");
        clock
    });
    let clocks: Vec<u32> = clocks.collect();
    assert_eq!((clocks.first(), clocks.last()), (Some(&3), Some(&4)));
    assert!(clocks.iter().all(|&clock| clock == 3 || clock == 4), "{clocks:?}");
}
